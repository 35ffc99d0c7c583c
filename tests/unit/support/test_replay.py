"""A trace replays as recorded, and the first difference is named; --record."""

import json
import os
import re
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import FinishCause
from tests.support.programs import run_python
from tests.support.replay import CALLS, play, record
from tests.support.scheduling import add_prompt, make_scheduler, run, step, two_bit_hash
from tests.support.source_tree import ROOT


def test_a_recorded_run_replays_and_the_first_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of every kind, preemptions, a call that raises, and a hash of the test's own."""
    scheduler = make_scheduler(7, 2, max_num_seqs=3, hash_function=two_bit_hash)
    trace = record(scheduler)
    with pytest.raises(ValueError, match="7 blocks"):
        add_prompt(scheduler, 50, 99)
    for seq_id in range(5):
        add_prompt(scheduler, 3, seq_id, max_tokens=6, stop_token_ids=(2,) if seq_id == 3 else ())
    step(scheduler)
    scheduler.preempt(scheduler.running[-1])
    scheduler.finish(scheduler.running[0], FinishCause.STOP_STRING)
    assert scheduler.abort(4)
    run(scheduler)
    trace = json.loads(json.dumps(trace))
    assert play(trace)["calls"] == len(trace["events"])
    assert {event["call"] for event in trace["events"]} == CALLS.keys() - {"schedule_next_async", "commit_async_batch"}
    monkeypatch.setattr(Scheduler, "_num_reserved_blocks", lambda *_: 0)
    with pytest.raises(AssertionError, match=r"step \d+, schedule, \w+: recorded"):
        play(trace)
    del trace["events"][0]["then"]["raised"]
    with pytest.raises(AssertionError, match=r"step 0, add, raised: recorded None, now 'ValueError"):
        play(trace)
    with pytest.raises(ValueError, match="begins with an empty cache"):
        record(scheduler)


def test_a_wrong_token_is_named() -> None:
    options = {"max_model_len": 64, "kv_cache_block_size": 16, "num_kv_cache_blocks": 5, "attention_backend": "torch"}
    with LLM(str(bundled_model_path()), device="cpu", **options) as llm:
        trace = record(llm)
        llm.generate(["In the beginning", "And God said"], SamplingParams(seed=1, max_tokens=8), use_tqdm=False)
    args = [event for event in trace["events"] if event["call"] == "postprocess"][-1]["args"]
    seq_id, right = args[0]
    args[0][1] = wrong = (right + 1) % 256
    with pytest.raises(AssertionError, match=f"token of sequence {seq_id}: recorded {wrong}, now {right}"):
        play(trace)


FAULT = """
from nanovllm.engine import scheduler
from nanovllm.engine.sequence import FinishCause
scheduler.finish_cause = lambda seq, **_: FinishCause.LENGTH if seq.num_completion_tokens > 3 else None
"""
TEST = """
from tests.support.scheduling import add_prompt, make_scheduler, run
def test_lengths():
    for num_prompts, max_tokens in ((3, 4), (1, 3)):
        scheduler = make_scheduler(30, 2)
        seqs = [add_prompt(scheduler, 4, seq_id, max_tokens=max_tokens) for seq_id in range(num_prompts)]
        run(scheduler)
        assert seqs[0].num_completion_tokens == max_tokens
"""


def test_a_failure_with_record_leaves_the_last_trace_and_the_command_that_replays_it(tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(FAULT)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p fault -p tests.support.replay\n")
    (tmp_path / "test_planted.py").write_text(TEST)
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONDONTWRITEBYTECODE": "1"}

    def output_of(*arguments: str) -> str:
        done = run_python("-m", *arguments, cwd=tmp_path, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout + done.stderr

    line = re.search(r"python -m (\S+) (\.traces/\S+)", output_of("pytest", "-p", "no:cacheprovider", "--record"))
    assert line is not None
    trace = json.loads((tmp_path / line[2]).read_text())
    assert [event["call"] for event in trace["events"]].count("add") == 1
    assert "step 3, postprocess, ended: recorded {}, now {'0': 'length'}" in output_of(*line.groups())
