"""ScheduleTrace: each kind of event is recorded in its step, and recording changes no decision."""

import pytest

from nanovllm.engine.scheduler import Scheduler
from nanovllm.outputs import FinishReason
from nanovllm.schedule_trace import recording
from tests.support.scheduling import add_prompt, make_scheduler, run, step

EOS = 0


def crowded() -> Scheduler:
    """Two sequences that outgrow a pool of six blocks of four tokens; the second one is preempted."""
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_model_len=20)
    for seq_id in range(2):
        add_prompt(scheduler, 5, seq_id, max_tokens=9)
    return scheduler


def test_a_prompt_in_chunks_and_its_end_are_recorded() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add_prompt(scheduler, 10, 0, max_tokens=2)
    with recording(scheduler) as trace:
        run(scheduler)
    assert [(s.is_prefill, s.computed, s.num_tokens) for s in trace.steps] == [
        (True, {0: (0, 8)}, 8),
        (True, {0: (8, 2)}, 2),
        (False, {0: (10, 1)}, 1),
    ]
    assert [s.admitted for s in trace.steps] == [{0: 0}, {}, {}]
    finished: list[dict[int, FinishReason]] = [{}, {}, {0: "length"}]
    assert [s.finished for s in trace.steps] == finished
    assert [s.num_owned_blocks for s in trace.steps] == [3, 3, 3]


def test_cached_blocks_and_evictions_are_those_of_the_pool() -> None:
    """Four blocks of four tokens. Before the recording, a sequence left the cached blocks 0 and 1, which are taken from
    the last to the first. Sequence 1 stores 13 tokens; its own full blocks are cached, and count once it has ended.
    """
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    add_prompt(scheduler, 9, 0, max_tokens=1)
    run(scheduler)
    with recording(scheduler) as trace:
        add_prompt(scheduler, 5, 1, max_tokens=9)
        run(scheduler)
        add_prompt(scheduler, 2, 2, max_tokens=1)
        run(scheduler)
    found = [(sorted(s.cached_blocks), s.num_evictions, s.num_owned_blocks) for s in trace.steps]
    two, three, four = [([0, 1], 0, 2)] * 4, [([0], 1, 3), *[([0], 0, 3)] * 3], [([], 1, 4)]
    assert found == [*two, *three, *four, ([1, 2, 3], 0, 1)]
    assert (trace.num_blocks, trace.block_size) == (4, 4)


def test_a_sequence_that_is_preempted_between_steps_is_admitted_again() -> None:
    """As after a step of another caller that failed."""
    scheduler = make_scheduler(block_size=4)
    seq = add_prompt(scheduler, 6, 0, max_tokens=5)
    with recording(scheduler) as trace:
        step(scheduler)
        scheduler.preempt(seq)
        step(scheduler)
    assert [(s.admitted, s.preempted) for s in trace.steps] == [({0: 0}, ()), ({0: 4}, (0,))]
    assert trace.num_preemptions == 1


def test_a_step_of_async_scheduling_is_recorded_as_it_was_committed() -> None:
    """Sequence 0 ends on the token of the step before, so the step that is computed for it is discarded."""
    scheduler = make_scheduler(eos_token_ids=frozenset({EOS}))
    for seq_id in range(2):
        add_prompt(scheduler, 3, seq_id, max_tokens=9)
    with recording(scheduler) as trace:
        batch = scheduler.schedule()
        ahead = scheduler.schedule_next_async(batch)
        assert ahead is not None
        scheduler.postprocess(batch, [EOS, 7])
        scheduler.commit_async_batch(ahead)
    assert [s.computed for s in trace.steps] == [{0: (0, 3), 1: (0, 3)}, {1: (3, 1)}]
    assert trace.steps[0].finished == {0: "stop"}


def test_recording_changes_no_decision_and_leaves_the_scheduler_as_it_was() -> None:
    def decisions(scheduler: Scheduler) -> list[tuple]:
        return [(b.is_prefill, [s.seq_id for s in b.sequences], b.num_scheduled_tokens) for b in run(scheduler)]

    scheduler = crowded()
    before = set(vars(scheduler))
    with recording(scheduler) as trace:
        found = decisions(scheduler)
        assert scheduler.schedule().is_empty, "which is no step"
    assert found == decisions(crowded())
    assert [(s.is_prefill, list(s.computed), tuple(n for _, n in s.computed.values())) for s in trace.steps] == found
    assert set(vars(scheduler)) == before
    with pytest.raises(KeyError), recording(scheduler):
        raise KeyError
    assert set(vars(scheduler)) == before
