"""Committed traces are played again: the same decisions in every field, and the model's tokens."""

from collections import Counter
from pathlib import Path

import pytest

from tests.replay.make_corpus import CORPUS, TRACES
from tests.replay.player import Machine, machine_for, play
from tests.replay.trace import Trace

FILES = sorted(CORPUS.glob("*.jsonl"))
ENGINES = [path for path in FILES if path.name.startswith("engine_")]


def events_of(trace: Trace, machine: Machine) -> Counter[str]:
    """What happened in a trace that was played on `machine`."""
    scheduler, manager = machine.scheduler, machine.scheduler.block_manager
    before = dict(zip(map(id, trace.events[1:]), trace.events, strict=False))
    aborts = [event for event in trace.events if event["do"] == "abort" and event["found"]]
    hash_values = Counter(value for _, _, value in trace.header["hashes"] or [])
    return Counter(
        preemption=scheduler.num_preemptions,
        chunked_prefill=scheduler.num_prefill_chunks,
        prefix_hits=manager.num_hit_blocks,
        eviction=manager.num_evictions,
        collision=sum(hash_values.values()) - len(hash_values),
        abort=len(aborts),
        abort_in_mid_step=sum(before[id(event)]["do"] == "schedule" for event in aborts),
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_decisions_are_those_recorded(path: Path) -> None:
    """Without the model; and the trace contains what its name says, or replaying it would show nothing."""
    trace = Trace.load(path)
    with machine_for(trace, "none") as machine:
        assert play(trace, machine).num_steps > 5
        events = events_of(trace, machine)
    expected = ("preemption", "chunked_prefill", "prefix_hits", "eviction", "abort")
    missing = [name for name in (expected if path.name.startswith("engine_") else (path.stem,)) if not events[name]]
    assert not missing, f"no {' and no '.join(missing)}"


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_tokens_are_those_recorded(path: Path) -> None:
    """On the CPU. Another machine's matrix products may round otherwise, so near ties are excused, one at most."""
    trace = Trace.load(path)
    with machine_for(trace) as machine:
        score = play(trace, machine)
    assert score.num_tokens >= 50
    assert score.num_excused <= 1


def test_every_trace_has_its_maker() -> None:
    assert {path.stem for path in FILES} == set(TRACES)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_tokens_on_a_gpu(path: Path) -> None:
    trace = Trace.load(path)
    with machine_for(trace, "cuda", enforce_eager=True) as machine:
        assert play(trace, machine).num_excused <= 1


@pytest.mark.gpu
def test_tokens_in_graphs() -> None:
    """The bundled model's trace has blocks that the triton backend takes, whose decode is recorded in graphs."""
    trace = Trace.load(CORPUS / "engine_bundled.jsonl")
    with machine_for(trace, "cuda", enforce_eager=False, attention_backend="triton") as machine:
        assert play(trace, machine).num_excused <= 1
