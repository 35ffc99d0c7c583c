"""Committed traces are played again: the same decisions, and the model's tokens. golden_runs.py makes them."""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.counts import count_comparisons
from tests.support.engine_events import assert_occurred, scheduler_events
from tests.support.replay.player import play, target_for
from tests.support.replay.trace import Trace
from tests.unit.engine.golden_runs import GOLDEN, RUNS

FILES = sorted(GOLDEN.glob("*.jsonl"))
EVENTS = {
    "preemption": ["preemption"],
    "crowd": ["prefill chunk", "block hit", "block evicted", "abort"],
    "engine": ["preemption", "prefill chunk", "block hit", "abort"],
}
ENGINE = GOLDEN / "engine.jsonl"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_decisions_are_those_recorded(path: Path) -> None:
    """Without the model."""
    trace = Trace.load(path)
    with target_for(trace, device="none") as scheduler:
        score = play(trace, scheduler)
    count_comparisons("scheduler: decisions against golden traces", score["calls"])
    aborts = sum(event["call"] == "abort" and event["then"]["returned"] for event in trace.events)
    events = scheduler_events(scheduler) + Counter(abort=aborts)
    assert_occurred(events, EVENTS[path.stem])


def test_each_run_has_its_trace() -> None:
    assert {path.stem for path in FILES} == {"engine", *(run.__name__ for run in RUNS)}


def test_tokens_are_those_recorded() -> None:
    """On the CPU. Another machine's matrix products may round otherwise, so one near tie is excused."""
    trace = Trace.load(ENGINE)
    with target_for(trace) as engine:
        score = play(trace, engine)
    count_comparisons("engine: tokens against a golden trace", score["tokens"])
    assert score["tokens"] >= 30
    assert score["excused"] <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(("is_eager", "backend"), [(True, "torch"), (False, "triton")])
def test_tokens_on_a_gpu(is_eager: bool, backend: str) -> None:
    """Recorded on a CPU; the triton backend's decode steps are recorded in CUDA graphs."""
    trace = Trace.load(ENGINE)
    with target_for(trace, device="cuda", attention_backend=backend, enforce_eager=is_eager) as engine:
        assert play(trace, engine)["excused"] <= 1
