"""Recorder: keeps in memory what every Scheduler is asked and decides, so that a failing test can leave its trace.

install() wraps Scheduler's methods and LLMEngine's constructor; the objects themselves stay as they are. Only what a
caller asks for is an event: a preemption inside schedule() is part of its decision.
"""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from nanovllm.engine.block_manager import BlockManager, block_hash
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from tests.replay.models import identify
from tests.replay.observing import decision_of, described, endings_of, limits_of, request_of
from tests.replay.trace import VERSION, Trace

NUM_KEPT = 4  # recordings of the running test: a Hypothesis test makes thousands, and its last one is the shrunk one

_recordings: WeakKeyDictionary[Scheduler, "Recording"] = WeakKeyDictionary()
_recent: deque["Recording"] = deque(maxlen=NUM_KEPT)  # those with events of the running test, the newest event last
_clock = itertools.count(1)


@dataclass
class _State:
    is_installed: bool = False
    is_paused: bool = False
    test: str = ""  # the running one


_state = _State()


class Recording:
    """The events of one scheduler, since its construction."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.limits = limits_of(scheduler)
        self.engine: tuple[str, dict[str, Any]] | None = None  # model and options of the LLMEngine around it
        self.events: list[dict[str, Any]] = []
        self.hashes: list[list[Any]] | None = None
        self.caveat: str | None = None
        self.num_steps = 0
        self.born = self.last_event = next(_clock)
        self.is_inside = False
        self._test = _state.test
        self._seq_ids: set[int] = set()
        self._watch_hashes(scheduler.block_manager)

    def trace(self) -> Trace:
        engine = None
        if self.engine is not None:
            model, options = self.engine
            engine = {"model": identify(Path(model)), "options": options}
        header = {
            "nanovllm_trace": VERSION,
            "scheduler": self.limits,
            "engine": engine,
            "hashes": self.hashes,
            "caveat": self.caveat,
        }
        return Trace(header, list(self.events))

    @contextmanager
    def event(self, kind: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """An event, to be completed inside; calls inside are no events of their own. Exceptions are noted and pass."""
        self.touch()
        event = {"do": kind, **fields}
        self.events.append(event)
        self.is_inside = True
        try:
            yield event
        except BaseException as error:
            event["raised"] = described(error)
            raise
        finally:
            self.is_inside = False

    def watched(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Executor.run or launch, which makes an event of what it raises; its tokens are seen in postprocess."""

        def watched(*args: Any) -> Any:
            try:
                return compute(*args)
            except BaseException as error:
                self.events.append({"do": "compute", "raised": described(error)})
                raise

        return watched

    def note_arrival(self, seq_id: int) -> None:
        if seq_id in self._seq_ids:
            self.caveat = f"two sequences have the seq_id {seq_id}"
        self._seq_ids.add(seq_id)

    def touch(self) -> None:
        """It is what happened last."""
        self.last_event = next(_clock)
        if _recent and _recent[-1] is self:
            return
        if self in _recent:
            _recent.remove(self)
        _recent.append(self)
        if self._test != _state.test:
            self._test = _state.test
            self.events.append({"do": "test", "name": self._test})

    def _watch_hashes(self, manager: BlockManager) -> None:
        if any(block.is_cached or block.ref_count for block in manager.blocks):
            self.caveat = "the block manager had been used before the scheduler was made"
        if manager._hash is block_hash:
            return
        hash_function, hashes, known = manager._hash, [], set()

        def watched(token_ids: list[int], parent: int | None) -> int:
            value = hash_function(token_ids, parent)
            key = (tuple(token_ids), parent)
            if key not in known:
                known.add(key)
                hashes.append([list(token_ids), parent, value])
            return value

        manager._hash, self.hashes = watched, hashes


# --- what the running test did ---


def begin_test(name: str) -> None:
    _recent.clear()
    _state.test = name


def recordings_of_test() -> list[Recording]:
    """Of the running test: the scheduler made last, and those that did something since; the newest event last."""
    newest = max((recording.born for recording in _recent), default=0)
    return [recording for recording in _recent if recording.last_event >= newest]


def recording_of(scheduler: Scheduler) -> Recording:
    return _recordings[scheduler]


@contextmanager
def paused() -> Iterator[None]:
    """Schedulers that are made inside leave no trace."""
    was_paused, _state.is_paused = _state.is_paused, True
    try:
        yield
    finally:
        _state.is_paused = was_paused


# --- where it looks ---


def install() -> None:
    """Record from now on. May be called twice."""
    if _state.is_installed:
        return
    _state.is_installed = True
    _wrap_constructors()
    _wrap("add", lambda scheduler, seq: request_of(seq), _note_arrival)
    _wrap("schedule", lambda scheduler: {"step": _recordings[scheduler].num_steps}, _decided)
    _wrap("schedule_ahead", lambda *_: {}, _decided_ahead)
    _wrap("take_up", lambda scheduler, _: {"step": _recordings[scheduler].num_steps}, _decided)
    _wrap("postprocess", _tokens, lambda scheduler, _, batch, token_ids: {"finished": endings_of(batch)})
    _wrap("abort", lambda scheduler, seq_id: {"seq": seq_id}, lambda scheduler, found, seq_id: {"found": found})
    _wrap("preempt", lambda scheduler, seq: {"seq": seq.seq_id}, lambda *_: {})
    _wrap("finish", lambda scheduler, seq, reason: {"seq": seq.seq_id, "reason": reason}, lambda *_: {})


def _wrap(name: str, before: Callable[..., dict[str, Any]], after: Callable[..., dict[str, Any]]) -> None:
    """Record calls of Scheduler.name: before(scheduler, *arguments) and after(scheduler, result, *arguments)."""
    original = getattr(Scheduler, name)

    @functools.wraps(original)
    def method(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        recording = _recordings.get(self)
        if recording is None or recording.is_inside:
            return original(self, *args, **kwargs)
        with recording.event(name, before(self, *args, **kwargs)) as event:
            result = original(self, *args, **kwargs)
            event.update(after(self, result, *args, **kwargs))
        return result

    setattr(Scheduler, name, method)


def _note_arrival(scheduler: Scheduler, _: None, seq: Sequence) -> dict[str, Any]:
    _recordings[scheduler].note_arrival(seq.seq_id)
    return {}


def _decided(scheduler: Scheduler, batch: ScheduledBatch, *_: Any) -> dict[str, Any]:
    _recordings[scheduler].num_steps += 1
    return decision_of(scheduler, batch)


def _decided_ahead(scheduler: Scheduler, ahead: ScheduledBatch | None, _: ScheduledBatch) -> dict[str, Any]:
    return {"ahead": None if ahead is None else decision_of(scheduler, ahead)}


def _tokens(scheduler: Scheduler, batch: ScheduledBatch, token_ids: list[int]) -> dict[str, Any]:
    tokens = [[seq.seq_id, token] for seq, token in zip(batch.sampled_sequences, token_ids, strict=False)]
    return {"step": _recordings[scheduler].num_steps - 1, "tokens": tokens}


def _wrap_constructors() -> None:
    make_scheduler, make_engine = Scheduler.__init__, LLMEngine.__init__

    @functools.wraps(make_scheduler)
    def scheduler_init(self: Scheduler, *args: Any, **kwargs: Any) -> None:
        make_scheduler(self, *args, **kwargs)
        if not _state.is_paused:
            _recordings[self] = Recording(self)
            _recordings[self].touch()

    @functools.wraps(make_engine)
    def engine_init(self: LLMEngine, model: Any, **options: Any) -> None:
        make_engine(self, model, **options)
        recording = _recordings.get(self.scheduler)
        if recording is not None:
            recording.engine = (os.fspath(model), options)
            self._executor.run = recording.watched(self._executor.run)
            self._executor.launch = recording.watched(self._executor.launch)

    Scheduler.__init__, LLMEngine.__init__ = scheduler_init, engine_init
