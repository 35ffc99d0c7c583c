"""Recording changes nothing that it was not asked for; the player names the first difference; --record."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import FinishCause
from tests.support.programs import run_python
from tests.support.replay import player
from tests.support.replay.player import play, target_for
from tests.support.replay.trace import CALLS, Trace, recording
from tests.support.scheduling import add_prompt, make_scheduler, run, step, two_bit_hash
from tests.support.source_tree import ROOT


def replay(trace: Trace) -> dict[str, int]:
    with target_for(trace, device="none") as scheduler:
        return play(trace, scheduler)


def event_of(trace: Trace, call: str, number: int) -> dict[str, Any]:
    return [event for event in trace.events if event["call"] == call][number]


# --- recording ---


def test_nothing_is_patched_unless_it_is_asked_for(pytestconfig: pytest.Config) -> None:
    files = {
        vars(owner)[name].__code__.co_filename for owner in (Scheduler, LLMEngine) for name in ("__init__", "abort")
    }
    assert pytestconfig.getoption("--record") or {Path(file).parent.name for file in files} == {"engine"}
    scheduler = make_scheduler()
    with recording(scheduler):
        assert set(CALLS) <= vars(scheduler).keys()
    assert not set(CALLS) & vars(scheduler).keys()


def test_a_recorded_run_replays_from_its_file(tmp_path: Path) -> None:
    """Calls of every kind, one that raises, and a hash of the test's own."""
    scheduler = make_scheduler(7, 2, max_num_seqs=3, hash_function=two_bit_hash)
    with recording(scheduler) as trace:
        with pytest.raises(ValueError, match="7 blocks"):
            add_prompt(scheduler, 50, 99)
        for seq_id in range(5):
            add_prompt(scheduler, 3, seq_id, max_tokens=6, stop_token_ids=(2,) if seq_id == 3 else ())
        step(scheduler)
        scheduler.preempt(scheduler.running[-1])
        scheduler.finish(scheduler.running[0], FinishCause.STOP_STRING)
        assert scheduler.abort(4)
        run(scheduler)
    trace.save(tmp_path / "new" / "trace.jsonl")
    loaded = Trace.load(tmp_path / "new" / "trace.jsonl")
    assert replay(loaded)["calls"] == len(trace.events)
    assert {event["call"] for event in loaded.events} == CALLS.keys() - {"schedule_next_async", "commit_async_batch"}
    del loaded.events[0]["then"]["raised"]
    with pytest.raises(AssertionError, match=r"step 0, add: recorded {}, now {'raised': 'ValueError"):
        replay(loaded)


def test_a_scheduler_that_was_used_is_refused() -> None:
    scheduler = make_scheduler()
    add_prompt(scheduler, 9)
    step(scheduler)
    with pytest.raises(ValueError, match="begins with an empty cache"), recording(scheduler):
        pass


def test_a_wrong_token_is_named_and_a_near_tie_is_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle of near ties is the float64 reference."""
    options = {"max_model_len": 64, "kv_cache_block_size": 16, "num_kv_cache_blocks": 5, "attention_backend": "torch"}
    with LLM(str(bundled_model_path()), device="cpu", **options) as llm, recording(llm) as trace:
        llm.generate(["In the beginning", "And God said"], SamplingParams(seed=1, max_tokens=8), use_tqdm=False)
    args = event_of(trace, "postprocess", 2)["args"]
    seq_id, right = args[0]
    args[0][1] = wrong = (right + 1) % 256
    message = f"token of sequence {seq_id}: recorded {wrong}, now {right}"
    with target_for(trace) as engine, pytest.raises(AssertionError, match=message):
        play(trace, engine)
    trace.events = trace.events[: trace.events.index(event_of(trace, "postprocess", 2)) + 1]
    monkeypatch.setattr(player, "is_rounding", lambda *_: True)
    with target_for(trace) as engine:
        assert play(trace, engine)["excused"] == 1


# --- --record ---

FAULT = """
from nanovllm.engine import scheduler
from nanovllm.engine.sequence import FinishCause
scheduler.finish_cause = lambda seq, **_: FinishCause.LENGTH if seq.num_completion_tokens > 3 else None
"""
TEST = """
from hypothesis import given, settings, strategies as st
from tests.support.scheduling import add_prompt, make_scheduler, run

@settings(max_examples=40, database=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_lengths(lengths):
    scheduler = make_scheduler(30, 2)
    seqs = [add_prompt(scheduler, n, seq_id, max_tokens=3) for seq_id, n in enumerate(lengths)]
    run(scheduler)
    assert [seq.num_completion_tokens for seq in seqs] == [3] * len(seqs)
"""


def test_a_failure_with_record_leaves_the_smallest_trace_and_the_command_that_replays_it(tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(FAULT)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p fault -p tests.support.replay.plugin\n")
    (tmp_path / "test_planted.py").write_text(TEST)
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONDONTWRITEBYTECODE": "1"}

    def output_of(*arguments: str) -> str:
        done = run_python("-m", *arguments, cwd=tmp_path, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "with --record, the command leaves a trace" in output_of("pytest", "-p", "no:cacheprovider")
    assert not (tmp_path / ".traces").exists()
    line = re.search(r"python -m (\S+) (\.traces/\S+)", output_of("pytest", "-p", "no:cacheprovider", "--record"))
    assert line is not None
    assert [event["call"] for event in Trace.load(tmp_path / line[2]).events].count("add") == 1
    assert "step 3, postprocess, ended: recorded {}, now {'0': 'length'}" in output_of(*line.groups())
