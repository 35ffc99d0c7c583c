"""Player: repeats the calls of a trace, and names the first difference: step, call, place, recorded, now.

    python -m tests.support.replay.player FILE [device=cpu|cuda|none] [attention_backend=...]

device=none replays the decisions alone, without a model. The tokens given to postprocess are the recorded ones, so
decisions are compared exactly on any device. Each token that the model computes is compared by itself, after the
recorded ones before it; where it differs, both must be tokens that rounding can choose (see tests/support/oracle.py).
"""

import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm import LLMEngine, SamplingParams, bundled_model_path
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import FinishCause, Sequence
from tests.support.block_invariants import check_invariants
from tests.support.replay.trace import Trace, outcome_of


@contextmanager
def target_for(trace: Trace, **options: Any) -> Iterator[Any]:
    """The trace's LLMEngine, with recorded options replaced; a Scheduler if none was recorded, or for device="none"."""
    if trace.header["engine"] is None or options.get("device") == "none":
        manager = BlockManager(*trace.header["pool"], pkgutil.resolve_name(trace.header["hash"]))
        yield Scheduler(manager, **trace.header["limits"])
        return
    model = trace.header["engine"]["model"] or bundled_model_path()
    if isinstance(model, list | tuple):
        from tests.support.tiny_models import tiny_model  # imports torch

        model = tiny_model(model[0], **{k: tuple(v) if isinstance(v, list) else v for k, v in model[1].items()})
    options = {**trace.header["engine"]["options"], **options, "async_scheduling": False}
    with LLMEngine(str(model), **options) as engine:
        yield engine


def is_rounding(engine: Any, seq: Sequence, token_id: int) -> bool:
    """Whether rounding in the engine's dtype can make `token_id` the next token."""
    from reference.checkpoint import load_checkpoint
    from tests.support.oracle import Oracle

    oracle = Oracle(Path(engine.config.model))
    oracle.single = load_checkpoint(oracle.model_dir, engine._core.executor._runner.kv_cache.dtype)
    return oracle.is_rounding(list(seq.token_ids), seq.sampling_params, seq.seed, token_id)


def play(trace: Trace, target: Any) -> Counter[str]:
    """Counts steps, calls, tokens, and excused tokens (near ties). Raises AssertionError at the first difference."""
    engine, scheduler = (None, target) if isinstance(target, Scheduler) else (target, target.scheduler)
    score: Counter[str] = Counter()
    sequences: dict[int, Sequence] = {}
    batches: dict[str, Any] = {}  # call -> the batch that it returned last; "current": of the step to postprocess
    tokens: list[int] | None = None

    def add(request: dict[str, Any]) -> None:
        values = {**request, "sampling_params": SamplingParams(**request["sampling_params"])}
        seq = sequences[request["seq_id"]] = Sequence(**values, block_size=scheduler.block_manager.block_size)
        scheduler.add(seq)

    calls = {
        "add": add,
        "schedule": lambda _: scheduler.schedule(),
        "schedule_next_async": lambda _: scheduler.schedule_next_async(batches["current"]),
        "commit_async_batch": lambda _: scheduler.commit_async_batch(batches["schedule_next_async"]),
        "postprocess": lambda args: scheduler.postprocess(
            batches["current"],
            [token_id for _, token_id in args],
            lambda seq: event["then"]["ended"].get(str(seq.seq_id)) == "stop",  # the text is not recorded
        ),
        "abort": scheduler.abort,
        "preempt": lambda seq_id: scheduler.preempt(sequences[seq_id]),
        "finish": lambda args: scheduler.finish(sequences[args[0]], FinishCause[args[1]]),
    }
    for event in trace.events:
        name, args, returned = event["call"], event["args"], None
        score.update(calls=1, steps=int(name in ("schedule", "commit_async_batch")))
        where = f"step {score['steps']}, {name}"
        for (seq_id, recorded), token_id in zip(args, tokens or [], strict=False) if name == "postprocess" else ():
            score["tokens"] += 1
            if token_id != recorded:
                if not all(is_rounding(engine, sequences[seq_id], choice) for choice in (recorded, token_id)):
                    raise AssertionError(f"{where}, token of sequence {seq_id}: recorded {recorded}, now {token_id}")
                score["excused"] += 1
        try:
            returned = batches[name] = calls[name](args)
            now = outcome_of(scheduler, returned, batches["current"] if name == "postprocess" else None)
        except Exception as error:
            now = {"raised": f"{type(error).__name__}: {error}"}
        for place, recorded, found in _differences(where, event["then"], now):
            raise AssertionError(f"{place}: recorded {recorded!r}, now {found!r}")
        check_invariants(scheduler.block_manager, (*scheduler.running, *scheduler.waiting))
        if name in ("schedule", "commit_async_batch") and returned is not None:
            batches["current"] = returned
            tokens = engine._core.executor.execute(returned).token_ids() if engine and not returned.is_empty else None
    return score


def _differences(place: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(place, recorded, now) of each value that differs, dicts entered."""
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys():
        for key in then:
            yield from _differences(f"{place}, {key}", then[key], now[key])
    elif then != now:
        yield place, then, now


if __name__ == "__main__":
    loaded = Trace.load(Path(sys.argv[1]))
    with target_for(loaded, **dict(word.split("=") for word in sys.argv[2:])) as made:
        print("the run goes as recorded:", dict(play(loaded, made)))
