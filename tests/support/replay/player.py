"""Player: does again what a trace records, and names the first difference: step, sequence, field, recorded, now.

The sampled tokens that postprocess takes in are the recorded ones. So decisions are compared exactly, whatever the
device; and each token that the model computes is compared on its own, after the recorded ones before it. Where it
differs, both must be choices that rounding in the run's dtype can make (tests.oracle says how that is decided).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanovllm.engine.block_manager import BlockManager, block_hash
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from tests.evidence import compared, happened
from tests.replay.models import locate
from tests.replay.observing import decision_of, described, endings_of
from tests.replay.recorder import paused
from tests.replay.trace import Trace


class Difference(AssertionError):
    """What is now is not what was recorded."""


@dataclass
class Score:
    """What a replay has compared. num_excused: tokens that differ as rounding can make them."""

    num_steps: int = 0
    num_decisions: int = 0
    num_tokens: int = 0
    num_excused: int = 0


class Machine(Protocol):
    """What a trace is played on."""

    scheduler: Scheduler

    def compute(self, batch: ScheduledBatch) -> list[int] | None:
        """Token ids of batch.sampled_sequences, or None where there is no model."""
        ...

    def is_rounding(self, seq: Sequence, token_id: int) -> bool:
        """Whether `token_id` can be the next token of seq as well as the float64 one."""
        ...


def play(trace: Trace, machine: Machine) -> Score:
    """Raises Difference; RuntimeError when an invariant of the block manager breaks on the way."""
    player = _Player(machine)
    for event in trace.events:
        getattr(player, f"do_{event['do']}")(event)
    compared("replay: decisions and tokens against the trace", player.score.num_decisions + player.score.num_tokens)
    happened("replayed step", player.score.num_steps)
    return player.score


class _Player:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.scheduler = machine, machine.scheduler
        self.score = Score()
        self.sequences: dict[int, Sequence] = {}
        self.batch: ScheduledBatch | None = None
        self.ahead: ScheduledBatch | None = None
        self.tokens: list[int] | None = None
        self.compute_error: str | None = None

    # --- events ---

    def do_test(self, event: dict[str, Any]) -> None:
        """A name for the reader."""

    def do_add(self, event: dict[str, Any]) -> None:
        params, block_size = SamplingParams(**event["params"]), self.scheduler.block_manager.block_size
        seq = Sequence(event["prompt"], params, seq_id=event["seq"], block_size=block_size, seed=event["seed"])
        self.sequences[seq.seq_id] = seq
        self._call(event, self.scheduler.add, seq)

    def do_abort(self, event: dict[str, Any]) -> None:
        found = self._call(event, self.scheduler.abort, event["seq"])
        self._compare("abort found it", event.get("found"), found, event["seq"])

    def do_preempt(self, event: dict[str, Any]) -> None:
        self._call(event, self.scheduler.preempt, self.sequences[event["seq"]])

    def do_finish(self, event: dict[str, Any]) -> None:
        self._call(event, self.scheduler.finish, self.sequences[event["seq"]], event["reason"])

    def do_schedule(self, event: dict[str, Any]) -> None:
        self._decide(event, self.scheduler.schedule)

    def do_schedule_ahead(self, event: dict[str, Any]) -> None:
        """It is computed when it is taken up: a replay waits for tokens in any case."""
        self.ahead = self._call(event, self.scheduler.schedule_ahead, self.batch)
        if "raised" in event:
            return
        self._compare("whether a step is begun ahead", event["ahead"] is not None, self.ahead is not None)
        if self.ahead is not None:
            self._compare_decision(event["ahead"], decision_of(self.scheduler, self.ahead))

    def do_take_up(self, event: dict[str, Any]) -> None:
        self._decide(event, self.scheduler.take_up, self.ahead)

    def _decide(self, event: dict[str, Any], decide: Callable[..., ScheduledBatch], *args: Any) -> None:
        self.score.num_steps = event["step"] + 1
        self.batch = self._call(event, decide, *args)
        if self.batch is None:
            return
        self._compare_decision(event, decision_of(self.scheduler, self.batch))
        self.tokens = self.compute_error = None
        if not self.batch.is_empty:
            try:
                self.tokens = self.machine.compute(self.batch)
            except Exception as error:
                self.compute_error = described(error)

    def do_compute(self, event: dict[str, Any]) -> None:
        """The model raised, then: here it may be a test's own fault, which a replay does not have."""
        if self.compute_error is not None:
            self._compare("exception of the model", event["raised"], self.compute_error)

    def do_postprocess(self, event: dict[str, Any]) -> None:
        assert self.batch is not None
        self._compare("exception of the model", None, self.compute_error)
        if self.tokens is not None:
            self._compare_tokens(event["tokens"], self.tokens)
        self._call(event, self.scheduler.postprocess, self.batch, [token for _, token in event["tokens"]])
        if "raised" not in event:
            self._compare("endings", event["finished"], endings_of(self.batch))
        self.scheduler.block_manager.check_invariants((*self.scheduler.running, *self.scheduler.waiting))

    # --- comparisons ---

    def _call(self, event: dict[str, Any], function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), which raises if and only if it did so then; None if it raised."""
        try:
            result, raised = function(*args), None
        except Exception as error:
            result, raised = None, described(error)
        self._compare(f"exception of {event['do']}", event.get("raised"), raised, event.get("seq"))
        return result

    def _compare_decision(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        for field in ("is_prefill", "running", "waiting", "sampled"):
            self._compare(field, then[field], now[field])
        self._compare("sequences of the batch", *([row["seq"] for row in side["batch"]] for side in (then, now)))
        for row_then, row_now in zip(then["batch"], now["batch"], strict=True):
            for field in ("scheduled", "cached", "stored", "table", "hashes"):
                self._compare(field, row_then[field], row_now[field], row_now["seq"])
        self._compare("free_blocks", then["free_blocks"], now["free_blocks"])

    def _compare_tokens(self, then: list[list[int]], now: list[int]) -> None:
        for (seq_id, recorded), token in zip(then, now, strict=True):
            self.score.num_tokens += 1
            if token == recorded:
                continue
            seq = self.sequences[seq_id]
            if all(self.machine.is_rounding(seq, choice) for choice in (recorded, token)):
                self.score.num_excused += 1
            else:
                self._fail("token", recorded, token, seq_id)

    def _compare(self, field: str, then: Any, now: Any, seq_id: int | None = None) -> None:
        self.score.num_decisions += 1
        if then != now:
            self._fail(field, then, now, seq_id)

    def _fail(self, field: str, then: Any, now: Any, seq_id: int | None) -> None:
        sequence = "" if seq_id is None else f", sequence {seq_id}"
        step = max(0, self.score.num_steps - 1)
        raise Difference(f"step {step}{sequence}, {field}: recorded {then!r}, now {now!r}")


# --- machines ---


class BareScheduler:
    """The decisions alone, without torch: of any trace, an engine's too."""

    def __init__(self, trace: Trace) -> None:
        limits = dict(trace.header["scheduler"])
        hashes = trace.header["hashes"]
        manager = BlockManager(
            limits.pop("num_blocks"), limits.pop("block_size"), block_hash if hashes is None else _recorded_hash(hashes)
        )
        eos_token_ids = frozenset(limits.pop("eos_token_ids"))
        with paused():
            self.scheduler = Scheduler(manager, eos_token_ids=eos_token_ids, **limits)

    def compute(self, batch: ScheduledBatch) -> None:
        return None

    def is_rounding(self, seq: Sequence, token_id: int) -> bool:
        return False


def _recorded_hash(hashes: list[list[Any]]) -> Callable[[list[int], int | None], int]:
    known = {(tuple(token_ids), parent): value for token_ids, parent, value in hashes}

    def hash_function(token_ids: list[int], parent: int | None) -> int:
        try:
            return known[tuple(token_ids), parent]
        except KeyError:
            raise Difference(
                f"the hash of {token_ids} after {parent} is asked for, and was not when recorded"
            ) from None

    return hash_function


class Engine:
    """An LLMEngine as recorded, but for what `options` changes; its KV cache has as many blocks as it had then."""

    def __init__(self, engine: Any, model_dir: Path) -> None:
        self.scheduler: Scheduler = engine.scheduler
        self._engine, self._model_dir, self._judge = engine, model_dir, None

    def compute(self, batch: ScheduledBatch) -> list[int]:
        return self._engine._executor.run(batch)

    def is_rounding(self, seq: Sequence, token_id: int) -> bool:
        if self._judge is None:
            from tests.replay.rounding import RoundingOracle

            self._judge = RoundingOracle(self._model_dir, dtype=self._engine.config.dtype)
        return self._judge.is_rounding(list(seq.token_ids), seq.sampling_params, seq.seed, token_id)


@contextmanager
def machine_for(trace: Trace, device: str | None = None, **options: Any) -> Iterator[Machine]:
    """What `trace` runs on: a bare scheduler for a scheduler's trace or device "none", else its engine on `device`.

    options replace the engine's recorded ones (enforce_eager, attention_backend).
    """
    recorded = trace.header["engine"]
    if recorded is None or device == "none":
        yield BareScheduler(trace)
        return
    from nanovllm import LLMEngine

    model_dir = locate(recorded["model"])
    options = {**recorded["options"], "num_kv_cache_blocks": trace.header["scheduler"]["num_blocks"], **options}
    if device is not None:
        options["device"] = device
    with paused():
        engine = LLMEngine(str(model_dir), **options)
    with engine:
        yield Engine(engine, model_dir)
