"""The player sees every recorded field, and names the first that differs; exceptions and near ties."""

import copy
import re
from typing import Any

import pytest

from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from tests.replay.make_corpus import CORPUS
from tests.replay.player import BareScheduler, Difference, machine_for, play
from tests.replay.recorder import recording_of
from tests.replay.trace import Trace, TraceError
from tests.unit.engine.harness import add_prompt, make_scheduler, run, step


def corpus(name: str) -> Trace:
    return Trace.load(CORPUS / f"{name}.jsonl")


def event_of(trace: Trace, kind: str, number: int) -> dict[str, Any]:
    return [event for event in trace.events if event["do"] == kind][number]


# --- differences ---


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("scheduled", 2), ("cached", 9), ("stored", 9), ("table", [0, 0]), ("hashes", [1]), ("seq", 9)],
)
def test_a_difference_in_a_sequence_is_named(field: str, wrong: Any) -> None:
    trace = corpus("preemption")
    row = event_of(trace, "schedule", 1)["batch"][1]
    right, row[field] = row[field], wrong
    what = "sequences of the batch: recorded" if field == "seq" else f"sequence 1, {field}: recorded"
    with pytest.raises(Difference, match=f"step 1.*{what}") as raised:
        play(trace, BareScheduler(trace))
    assert str(wrong) in str(raised.value)
    assert str(right) in str(raised.value)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("is_prefill", True), ("sampled", []), ("running", [9]), ("waiting", [9]), ("free_blocks", 99)],
)
def test_a_difference_in_a_step_is_named(field: str, wrong: Any) -> None:
    trace = corpus("preemption")
    event_of(trace, "schedule", 1)[field] = wrong
    with pytest.raises(Difference, match=re.escape(f"step 1, {field}: recorded {wrong}, now")):
        play(trace, BareScheduler(trace))


def test_a_difference_in_how_requests_end_is_named() -> None:
    trace = corpus("preemption")
    ending = next(event for event in trace.events if event.get("finished"))
    ending["finished"][0][1] = "stop"
    with pytest.raises(Difference, match=rf"step {ending['step']}, endings: .*'stop'.*, now .*'length'"):
        play(trace, BareScheduler(trace))


def test_an_abort_that_finds_nothing_any_more_is_named() -> None:
    trace = corpus("abort_in_mid_step")
    event_of(trace, "abort", 0)["seq"] = 77
    with pytest.raises(Difference, match="sequence 77, abort found it: recorded True, now False"):
        play(trace, BareScheduler(trace))


def test_a_changed_decision_of_the_engine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus' use: admission that reserves no blocks."""
    monkeypatch.setattr(Scheduler, "_num_reserved_blocks", lambda *_: 0)
    trace = corpus("preemption")
    with pytest.raises(Difference, match="step 0, running: recorded"):
        play(trace, BareScheduler(trace))


def test_a_hash_of_a_test_that_is_asked_for_something_else_is_named() -> None:
    trace = corpus("collision")
    trace.header["hashes"].pop(0)
    with pytest.raises(Difference, match=r"the hash of \[.*\] after .* is asked for, and was not"):
        play(trace, BareScheduler(trace))


# --- exceptions ---


def test_what_raised_must_raise_again() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=2)
    with pytest.raises(ValueError, match="2 blocks"):
        add_prompt(scheduler, 5, 0, max_tokens=5)
    add_prompt(scheduler, 2, 1, max_tokens=2)
    run(scheduler)
    trace = recording_of(scheduler).trace()
    assert trace.events[0]["raised"].startswith("ValueError: prompt and output must fit")
    assert play(trace, BareScheduler(trace)).num_steps == 2
    del trace.events[0]["raised"]
    with pytest.raises(Difference, match="sequence 0, exception of add: recorded None, now 'ValueError"):
        play(trace, BareScheduler(trace))


def test_an_invariant_that_breaks_on_the_way_is_reported() -> None:
    trace = corpus("preemption")
    machine = BareScheduler(trace)
    machine.scheduler.block_manager.blocks[8].ref_count = 1  # and it is on the free list, too
    with pytest.raises(RuntimeError, match="invariant broken"):
        play(trace, machine)


# --- tokens ---


class OneWrongToken(BareScheduler):
    """A model that says what was recorded, but once."""

    def __init__(self, trace: Trace, tying: set[int]) -> None:
        super().__init__(trace)
        self._answers = [[token for _, token in event["tokens"]] for event in trace.events if "tokens" in event]
        self._answers[3][0] = 55
        self._tying = tying

    def compute(self, batch: ScheduledBatch) -> list[int]:
        return self._answers.pop(0)

    def is_rounding(self, seq: Sequence, token_id: int) -> bool:
        return token_id in self._tying


def test_a_token_that_ties_is_excused_and_the_recorded_one_goes_on() -> None:
    trace = corpus("preemption")
    recorded = event_of(trace, "postprocess", 3)["tokens"][0][1]
    assert play(trace, OneWrongToken(trace, {recorded, 55})).num_excused == 1


@pytest.mark.parametrize("only_tie", ["recorded", "now"])
def test_a_token_is_not_excused_unless_both_tie(only_tie: str) -> None:
    trace = corpus("preemption")
    seq_id, recorded = event_of(trace, "postprocess", 3)["tokens"][0]
    with pytest.raises(Difference, match=f"step 3, sequence {seq_id}, token: recorded {recorded}, now 55"):
        play(trace, OneWrongToken(trace, {recorded if only_tie == "recorded" else 55}))


def test_a_wrong_token_of_a_model_is_no_rounding() -> None:
    """A real engine, its judge the float64 reference: as if the recorded run had had a fault that is now mended."""
    trace = corpus("engine_llama")
    seq_id, right = event_of(trace, "postprocess", 0)["tokens"][0]
    event_of(trace, "postprocess", 0)["tokens"][0][1] = (right + 1) % 256
    with (
        machine_for(trace) as machine,
        pytest.raises(Difference, match=rf"step 0, sequence {seq_id}, token: .*{right}"),
    ):
        play(trace, machine)


# --- models ---


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sha256": "0"}, "are not those the trace was recorded with"), ({"tiny": "qwen2"}, "are not those")],
)
def test_other_weights_are_refused(change: dict[str, str], message: str) -> None:
    trace = copy.deepcopy(corpus("engine_llama"))
    trace.header["engine"]["model"] |= change
    with pytest.raises(TraceError, match=message), machine_for(trace):
        pass
    with machine_for(trace, "none") as machine:
        play(trace, machine)


def test_a_model_that_is_gone_is_named() -> None:
    trace = corpus("engine_llama")
    trace.header["engine"]["model"] = {"path": "/nowhere/model", "sha256": "0"}
    with pytest.raises(TraceError, match="model /nowhere/model is not there"), machine_for(trace):
        pass


def test_a_run_recorded_now_goes_as_recorded() -> None:
    scheduler = make_scheduler(7, 2, max_num_seqs=3)
    for seq_id in range(5):
        add_prompt(scheduler, 3, seq_id, max_tokens=6, stop_token_ids=(2,) if seq_id == 3 else ())
    step(scheduler)
    scheduler.preempt(scheduler.running[-1])
    scheduler.finish(scheduler.running[0], "stop")
    run(scheduler)
    trace = recording_of(scheduler).trace()
    assert {"preempt", "finish"} <= {event["do"] for event in trace.events}
    play(trace, BareScheduler(trace))
