"""What the recorder keeps, of which scheduler, and when it says that a run cannot be repeated."""

from collections.abc import Iterator

import pytest

from nanovllm import LLM
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.worker.model_runner import ModelRunner
from tests.replay import recorder
from tests.replay.player import machine_for, play
from tests.tiny_models import tiny_model
from tests.unit.engine.harness import add_prompt, computed, make_scheduler, run, step


@pytest.fixture(autouse=True)
def _recording() -> Iterator[None]:
    recorder.install()
    yield
    recorder.begin_test("")


def finished_scheduler() -> Scheduler:
    scheduler = make_scheduler()
    add_prompt(scheduler, 3, max_tokens=2)
    run(scheduler)
    return scheduler


def test_the_last_of_many_schedulers_is_kept() -> None:
    """As Hypothesis leaves them: its last run is the shrunk one."""
    for _ in range(20):
        scheduler = finished_scheduler()
    assert recorder.recordings_of_test() == [recorder.recording_of(scheduler)]


def test_schedulers_that_take_turns_are_all_kept() -> None:
    schedulers = [make_scheduler(), make_scheduler()]
    for scheduler in schedulers:
        add_prompt(scheduler, 3, max_tokens=4)
    for _ in range(2):
        for scheduler in schedulers:
            step(scheduler)
    assert recorder.recordings_of_test() == [recorder.recording_of(scheduler) for scheduler in schedulers]


def test_a_scheduler_that_outlives_a_test_keeps_its_history() -> None:
    """A shared engine's prefix cache comes from the tests before."""
    scheduler = finished_scheduler()
    recorder.begin_test("the next test")
    assert recorder.recordings_of_test() == []
    add_prompt(scheduler, 3, 1, max_tokens=2)
    (recording,) = recorder.recordings_of_test()
    kinds = [event["do"] for event in recording.events]
    assert kinds == ["add", *["schedule", "postprocess"] * 2, "test", "add"]
    assert recording.events[5]["name"] == "the next test"


def test_what_happens_inside_a_step_is_no_event_of_its_own() -> None:
    """Preemptions and endings are part of the step that decides them."""
    scheduler = make_scheduler(9, 2, max_num_seqs=4)
    for seq_id in range(4):
        add_prompt(scheduler, 3, seq_id, max_tokens=9)
    run(scheduler)
    assert scheduler.num_preemptions > 0
    kinds = {event["do"] for event in recorder.recording_of(scheduler).events}
    assert kinds == {"add", "schedule", "postprocess"}


def test_paused_leaves_no_recording() -> None:
    with recorder.paused():
        scheduler = finished_scheduler()
    with pytest.raises(KeyError):
        recorder.recording_of(scheduler)


def test_equal_seq_ids_are_a_caveat() -> None:
    scheduler = make_scheduler()
    for _ in range(2):
        add_prompt(scheduler, 3, seq_id=5)
    assert recorder.recording_of(scheduler).caveat == "two sequences have the seq_id 5"


def test_blocks_that_were_used_before_are_a_caveat() -> None:
    manager = BlockManager(8, 4)
    computed(manager, [1, 2, 3, 4])
    scheduler = Scheduler(manager, max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8)
    assert "had been used before" in str(recorder.recording_of(scheduler).caveat)
    assert recorder.recording_of(make_scheduler()).caveat is None


def test_a_model_that_raises_is_recorded_and_its_run_can_be_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's request is aborted. The replay's model does not raise, and what it computes is not used."""
    options = {"attention_backend": "torch", "kv_cache_block_size": 4, "num_kv_cache_blocks": 8, "max_model_len": 32}
    with LLM(str(tiny_model("llama")), device="cpu", max_num_seqs=2, max_num_batched_tokens=16, **options) as llm:
        monkeypatch.setattr(ModelRunner, "run", lambda *_: 1 / 0)
        llm.add_request([1, 2, 3])
        with pytest.raises(ZeroDivisionError):
            llm.step()
        trace = recorder.recording_of(llm.scheduler).trace()
    events = [(event["do"], event.get("raised")) for event in trace.events]
    error = "ZeroDivisionError: division by zero"
    assert events == [("add", None), ("schedule", None), ("compute", error), ("abort", None)]
    monkeypatch.undo()
    with machine_for(trace) as machine:
        assert play(trace, machine).num_steps == 1
