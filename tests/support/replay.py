"""Replay: `pytest --record` leaves the calls of a failing test's scheduler in .traces/; this program repeats them.

    python -m tests.support.replay FILE [device=cpu|cuda|none] [attention_backend=...]

It names the first difference: step, call, place, recorded, now. device=none replays the decisions alone, without a
model. The tokens given to postprocess are the recorded ones, so decisions are compared exactly on any device, and each
token that the model computes is compared by itself, after the recorded ones before it; those are told at the end.

A trace says how to make the scheduler (pool, limits, hash) and the LLMEngine around it, if any. Its events are calls:
{"call": "schedule", "args": null, "then": {"is_prefill": true, "batch": {"0": {...}}, "running": [0], ...}}. Only what
a caller asks for is an event: a preemption inside schedule() is part of its outcome. Without --record no class is
patched.
"""

import json
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLMEngine, SamplingParams, bundled_model_path
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import FinishCause, Sequence
from tests.support.block_invariants import check_invariants

Trace = dict[str, Any]
LAST = pytest.StashKey[Trace | None]()  # of the running test: the trace with the last event


# --- recording ---


# Scheduler's methods that change it -> what is recorded of their arguments.
CALLS: dict[str, Callable[..., Any]] = {
    "add": lambda seq: {
        "seq_id": seq.seq_id,
        "token_ids": list(seq.token_ids),
        "sampling_params": asdict(seq.sampling_params),
        "seed": seq.seed,
    },
    "schedule": lambda: None,
    "schedule_next_async": lambda batch: None,
    "commit_async_batch": lambda ahead: None,
    "postprocess": lambda batch, tokens, *_: [
        [seq.seq_id, token] for seq, token in zip(batch.sampled_sequences, tokens, strict=True)
    ],
    "abort": lambda seq_id: seq_id,
    "preempt": lambda seq: seq.seq_id,
    "finish": lambda seq, cause: [seq.seq_id, cause.name],
}


def outcome_of(scheduler: Scheduler, returned: Any, postprocessed: ScheduledBatch | None) -> dict[str, Any]:
    """What a call has returned and changed. postprocessed: the batch, if the call was postprocess."""
    outcome: dict[str, Any] = {"returned": returned}
    if postprocessed is not None:
        outcome = {"ended": {str(seq.seq_id): seq.finish_reason for seq in postprocessed.sequences if seq.is_finished}}
    elif isinstance(returned, ScheduledBatch):
        rows = {
            str(seq.seq_id): {"scheduled": number, "cached": seq.num_cached_tokens, "table": list(seq.block_table)}
            for seq, number in zip(returned.sequences, returned.num_scheduled_tokens, strict=True)
        }
        sampled = [seq.seq_id for seq in returned.sampled_sequences]
        outcome = {"is_prefill": returned.is_prefill, "batch": rows, "sampled": sampled}
    queues = {name: [seq.seq_id for seq in getattr(scheduler, name)] for name in ("running", "waiting")}
    return {**outcome, **queues, "free_blocks": scheduler.block_manager.num_free_blocks}


def record(recorded: LLMEngine | Scheduler, on_event: Callable[[Trace], None] = lambda trace: None) -> Trace:
    """Record for as long as the scheduler exists: its methods are wrapped. on_event: called when an event begins."""
    scheduler = recorded if isinstance(recorded, Scheduler) else recorded.scheduler
    manager = scheduler.block_manager
    if any(block.is_cached or block.ref_count for block in manager.blocks):
        raise ValueError("a trace begins with an empty cache: record a scheduler that has not been used")
    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")
    limits = {name: getattr(scheduler, name) for name in names} | {"eos_token_ids": sorted(scheduler.eos_token_ids)}
    trace: Trace = {
        "pool": [len(manager.blocks), manager.block_size],
        "limits": limits,
        "hash": f"{manager._hash.__module__}:{manager._hash.__qualname__}",
        "engine": describe(recorded) if isinstance(recorded, LLMEngine) else None,
        "events": [],
    }
    is_inside = False  # a call that another one makes is no event

    def call(name: str, method: Callable[..., Any], *args: Any) -> Any:
        nonlocal is_inside
        if is_inside:
            return method(*args)
        event: dict[str, Any] = {"call": name, "args": CALLS[name](*args)}
        trace["events"].append(event)
        on_event(trace)
        is_inside = True
        try:
            returned = method(*args)
            event["then"] = outcome_of(scheduler, returned, args[0] if name == "postprocess" else None)
            return returned
        except BaseException as error:
            event["then"] = {"raised": f"{type(error).__name__}: {error}"}
            raise
        finally:
            is_inside = False

    for name in CALLS:
        setattr(scheduler, name, partial(call, name, getattr(scheduler, name)))
    return trace


def describe(engine: LLMEngine) -> dict[str, Any]:
    """Model and options with which the engine can be made again: a tiny model's recipe, None for the bundled one."""
    from tests.support.tiny_models import recipe_of  # imports torch

    options = {**asdict(engine.config), "num_kv_cache_blocks": len(engine.scheduler.block_manager.blocks)}
    path = Path(options.pop("model"))
    return {"model": None if path == bundled_model_path() else recipe_of(path) or str(path), "options": options}


# --- pytest's option ---


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nanovllm")
    group.addoption("--record", action="store_true", help="a failed test leaves its scheduler's trace in .traces/")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--record"):
        return
    make_scheduler, make_engine = Scheduler.__init__, LLMEngine.__init__
    traces: dict[int, Trace] = {}  # of the schedulers' ids

    def scheduler_init(scheduler: Any, *args: Any, **limits: Any) -> None:
        make_scheduler(scheduler, *args, **limits)
        traces[id(scheduler)] = record(scheduler, lambda trace: config.stash.__setitem__(LAST, trace))

    def engine_init(engine: Any, *args: Any, **options: Any) -> None:
        make_engine(engine, *args, **options)
        traces[id(engine.scheduler)]["engine"] = describe(engine)

    patch = pytest.MonkeyPatch()
    patch.setattr(Scheduler, "__init__", scheduler_init)
    patch.setattr(LLMEngine, "__init__", engine_init)
    config.add_cleanup(patch.undo)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[LAST] = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    trace = item.config.stash.get(LAST, None)
    if report.failed and trace is not None:
        path = Path(".traces", re.sub(r"[^\w.]+", "-", item.nodeid)[-120:].strip("-") + ".json")
        (item.config.rootpath / path).parent.mkdir(exist_ok=True)
        (item.config.rootpath / path).write_text(json.dumps(trace), encoding="utf-8")
        report.sections.append(("replay with", f"python -m tests.support.replay {path}"))
    return report


# --- playing ---


def play(trace: Trace, **options: Any) -> Counter[str]:
    """Counts steps, calls and tokens. Raises AssertionError at the first difference; at the end if it is of a token.

    options: of the engine, in the place of the recorded ones; device="none" takes a Scheduler alone.
    """
    if trace["engine"] is None or options.get("device") == "none":
        manager = BlockManager(*trace["pool"], pkgutil.resolve_name(trace["hash"]))
        return _play(trace, Scheduler(manager, **trace["limits"]), None)
    model = trace["engine"]["model"] or bundled_model_path()
    if isinstance(model, list | tuple):
        from tests.support.tiny_models import tiny_model

        model = tiny_model(model[0], **{k: tuple(v) if isinstance(v, list) else v for k, v in model[1].items()})
    options = {**trace["engine"]["options"], **options, "async_scheduling": False}
    with LLMEngine(str(model), **options) as engine:
        return _play(trace, engine.scheduler, engine)


def _play(trace: Trace, scheduler: Scheduler, engine: LLMEngine | None) -> Counter[str]:
    score: Counter[str] = Counter()
    sequences: dict[int, Sequence] = {}
    batches: dict[str, Any] = {}  # call -> the batch that it returned last; "current": of the step to postprocess
    tokens: list[int] = []
    other_tokens: list[str] = []

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
    for event in trace["events"]:
        name, args, then, returned = event["call"], event["args"], event["then"], None
        score.update(calls=1, steps=int(name in ("schedule", "commit_async_batch")))
        where = f"step {score['steps']}, {name}"
        for (seq_id, recorded), token_id in zip(args, tokens, strict=False) if name == "postprocess" else ():
            score["tokens"] += 1
            if token_id != recorded:
                other_tokens.append(f"{where}, token of sequence {seq_id}: recorded {recorded}, now {token_id}")
        try:
            returned = batches[name] = calls[name](args)
            now = outcome_of(scheduler, returned, batches["current"] if name == "postprocess" else None)
        except Exception as error:
            now = {"raised": f"{type(error).__name__}: {error}"}
        for key in dict.fromkeys((*then, *now)):
            same = then.get(key) == now.get(key)
            assert same, f"{where}, {key}: recorded {then.get(key)!r}, now {now.get(key)!r}"
        check_invariants(scheduler.block_manager, (*scheduler.running, *scheduler.waiting))
        if name in ("schedule", "commit_async_batch") and returned is not None:
            batches["current"] = returned
            tokens = engine._core.executor.execute(returned).token_ids() if engine and not returned.is_empty else []
    assert not other_tokens, "\n".join(other_tokens)
    return score


if __name__ == "__main__":
    if not Path(file := "".join(sys.argv[1:2])).is_file():
        sys.exit(f"FILE must be a trace that `pytest --record` left in .traces/, got {file!r}")
    loaded = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("the run goes as recorded:", dict(play(loaded, **dict(word.split("=") for word in sys.argv[2:]))))
