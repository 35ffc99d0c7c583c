"""Trace: the calls of one Scheduler and what each of them did; `with recording(engine_or_scheduler) as trace: ...`

    {"nanovllm_trace": 2, "pool": [num_blocks, block_size], "limits": {...}, "hash": "module:function", "engine": null}
    {"call": "add", "args": {"seq_id": 0, "token_ids": [5, 9, 2], ...}, "then": {"returned": null, ...}}
    {"call": "schedule", "args": null, "then": {"is_prefill": true, "batch": {"0": {...}}, "running": [0], ...}}

engine: of a scheduler inside an LLMEngine, its model and options. Where a call raised: "then": {"raised": "..."}. Only
what a caller asks for is an event: a preemption inside schedule() is part of its outcome.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nanovllm import LLMEngine, SamplingParams, bundled_model_path
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence

VERSION = 2


@dataclass
class Trace:
    header: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in (self.header, *self.events)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Raises OSError; ValueError if the file is cut off, or not a trace of this version."""
        header, *events = map(json.loads, path.read_text(encoding="utf-8").splitlines() or ["{}"])
        if not isinstance(header, dict) or header.get("nanovllm_trace") != VERSION:
            raise ValueError(f"{path} is not a trace of version {VERSION}; record it again (pytest --record)")
        return cls(header, events)


def request_of(seq: Sequence) -> dict[str, Any]:
    """Of the parameters, those that are not SamplingParams' defaults."""
    params = dict(sorted(asdict(seq.sampling_params).items() - asdict(SamplingParams()).items()))
    return {"seq_id": seq.seq_id, "token_ids": list(seq.token_ids), "sampling_params": params, "seed": seq.seed}


# Scheduler's methods that change it -> what is recorded of their arguments.
CALLS: dict[str, Callable[..., Any]] = {
    "add": request_of,
    "schedule": lambda: None,
    "schedule_next_async": lambda batch: None,
    "commit_async_batch": lambda ahead: None,
    "postprocess": lambda batch, tokens, *_: [
        [s.seq_id, t] for s, t in zip(batch.sampled_sequences, tokens, strict=True)
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
        outcome = {"is_prefill": returned.is_prefill, "batch": rows}
        outcome["sampled"] = [seq.seq_id for seq in returned.sampled_sequences]
    queues = {name: [seq.seq_id for seq in getattr(scheduler, name)] for name in ("running", "waiting")}
    return {**outcome, **queues, "free_blocks": scheduler.block_manager.num_free_blocks}


@contextmanager
def recording(recorded: LLMEngine | Scheduler) -> Iterator[Trace]:
    """Record within the block: the methods of this one scheduler object are wrapped, and restored at the end."""
    scheduler = recorded if isinstance(recorded, Scheduler) else recorded.scheduler
    trace = record(scheduler)
    trace.header["engine"] = describe(recorded) if isinstance(recorded, LLMEngine) else None
    try:
        yield trace
    finally:
        for name in CALLS:
            delattr(scheduler, name)


def record(scheduler: Scheduler, on_event: Callable[[Trace], None] = lambda trace: None) -> Trace:
    """Record for as long as the scheduler exists. on_event: called when an event begins."""
    manager = scheduler.block_manager
    if any(block.is_cached or block.ref_count for block in manager.blocks):
        raise ValueError("a trace begins with an empty cache: record a scheduler that has not been used")
    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")
    limits = {name: getattr(scheduler, name) for name in names} | {"eos_token_ids": sorted(scheduler.eos_token_ids)}
    header = {"nanovllm_trace": VERSION, "pool": [len(manager.blocks), manager.block_size], "limits": limits}
    trace = Trace({**header, "hash": f"{manager._hash.__module__}:{manager._hash.__qualname__}", "engine": None})
    is_inside = False  # a call that another one makes is no event

    def call(name: str, method: Callable[..., Any], *args: Any) -> Any:
        nonlocal is_inside
        if is_inside:
            return method(*args)
        event: dict[str, Any] = {"call": name, "args": CALLS[name](*args)}
        trace.events.append(event)
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
    from tests.support.tiny_models import recipe_of

    options = {**asdict(engine.config), "num_kv_cache_blocks": len(engine.scheduler.block_manager.blocks)}
    path = Path(options.pop("model"))
    return {"model": None if path == bundled_model_path() else recipe_of(path) or str(path), "options": options}
