"""Scheduler.schedule_next_async and commit_async_batch, case by case."""

from typing import Any

import pytest

from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from tests.support.block_invariants import check_invariants
from tests.support.scheduling import add_prompt, allocated, make_scheduler, step

EOS = 0


def started(num_seqs: int = 3, max_tokens: int = 9, **limits: Any) -> tuple[Scheduler, list[Sequence], ScheduledBatch]:
    """Sequences of 3, 4, ... tokens, and the prefill of all of them, scheduled and not postprocessed."""
    scheduler = make_scheduler(**limits, eos_token_ids=frozenset({EOS}))
    sequences = [add_prompt(scheduler, 3 + index, index, max_tokens=max_tokens) for index in range(num_seqs)]
    return scheduler, sequences, scheduler.schedule()


def test_the_decode_step_after_a_prefill_is_known_and_counts_as_one() -> None:
    """D15: prefills may follow it as they may follow any decode step."""
    scheduler, sequences, batch = started()
    scheduler._num_consecutive_prefills = 8
    ahead = scheduler.schedule_next_async(batch)
    assert scheduler._num_consecutive_prefills == 0
    assert ahead == ScheduledBatch(False, tuple(sequences), (1, 1, 1), tuple(sequences))
    assert [len(seq.block_table) for seq in sequences] == [1, 2, 2], "blocks of 4: tokens 4, 5 and 6"
    scheduler.postprocess(batch, [7, 8, 9])
    assert scheduler.commit_async_batch(ahead) == ahead
    scheduler.postprocess(ahead, [1, 2, 3])
    assert [seq.completion_token_ids for seq in sequences] == [[7, 1], [8, 2], [9, 3]]
    assert [seq.num_cached_tokens for seq in sequences] == [4, 5, 6]
    check_invariants(scheduler.block_manager, sequences)


def test_sequences_that_end_or_are_preempted_meanwhile_are_left_out() -> None:
    """D11: the others go on, also when one is aborted after commit_async_batch."""
    scheduler, sequences, batch = started(num_seqs=4)
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    scheduler.postprocess(batch, [7, EOS, 9, 9])
    assert sequences[1].finish_reason == "stop"
    scheduler.preempt(sequences[3])
    current = scheduler.commit_async_batch(ahead)
    assert current.sequences == current.sampled_sequences == (sequences[0], sequences[2])
    assert scheduler.abort(2)
    assert current.num_scheduled_tokens == (1, 1)
    scheduler.postprocess(current, [1, 3])
    assert [sequences[index].completion_token_ids for index in (0, 2)] == [[7, 1], [9]]
    check_invariants(scheduler.block_manager, scheduler.running)


@pytest.mark.parametrize(
    ("limits", "num_ahead"),
    [
        ({"max_tokens": 1}, None),  # all end by length
        ({"max_model_len": 6}, 2),  # the third has 5 tokens, and 6 with the next one
    ],
)
def test_the_decode_step_after_a_prefill(limits: dict[str, Any], num_ahead: int | None) -> None:
    scheduler, _, batch = started(**limits)
    ahead = scheduler.schedule_next_async(batch)
    assert (None if ahead is None else len(ahead.sequences)) == num_ahead


def test_the_prefill_after_a_prefill_is_the_one_that_schedule_would_choose() -> None:
    """A chunk of a prompt, then two prompts of which one begins with a block that the prefill before computes."""
    chosen, states = [], []
    for is_ahead in (True, False):
        scheduler = make_scheduler(32, 4, max_num_batched_tokens=10, max_num_seqs=8)
        add_prompt(scheduler, 6, 0, max_tokens=9)
        sequences = [add_prompt(scheduler, 9, 1, max_tokens=9), add_prompt(scheduler, 6, 0, max_tokens=9)]
        batch = scheduler.schedule()
        assert batch.num_scheduled_tokens == (6, 4)
        ahead = scheduler.schedule_next_async(batch) if is_ahead else None
        scheduler.postprocess(batch, [7])
        after = scheduler.schedule() if ahead is None else scheduler.commit_async_batch(ahead)
        assert after.is_prefill
        chosen.append((after.num_scheduled_tokens, [seq.block_table for seq in after.sequences]))
        scheduler.postprocess(after, [8, 9])
        states.append([(seq.num_cached_tokens, seq.completion_token_ids) for seq in sequences])
        check_invariants(scheduler.block_manager, scheduler.running)
    assert chosen[0] == chosen[1] == ((5, 2), [[2, 3, 4], [0, 5]])
    assert states[0] == states[1] == [(9, [8]), (6, [9])]


def test_prefills_in_a_row_are_counted_ahead_too() -> None:
    """D15: a running sequence waits for at most eight."""
    scheduler, _, batch = started(num_seqs=1, max_num_seqs=16)
    for index in range(1, 12):
        add_prompt(scheduler, 3, index, max_tokens=9)
    scheduler.max_num_batched_tokens = 3
    num_ahead = 0
    while (ahead := scheduler.schedule_next_async(batch)) is not None:
        scheduler.postprocess(batch, [7] * len(batch.sampled_sequences))
        batch = scheduler.commit_async_batch(ahead)
        assert batch.is_prefill
        num_ahead += 1
    assert num_ahead == 7
    scheduler.postprocess(batch, [7])
    assert not scheduler.schedule().is_prefill


def test_a_prefill_that_fails_leaves_nothing_in_the_prefix_cache() -> None:
    """Its blocks were entered before they were computed; a step ahead may share them."""
    scheduler = make_scheduler(32, 4, max_num_batched_tokens=8, max_num_seqs=8)
    sequences = [add_prompt(scheduler, 8, 0, max_tokens=9) for _ in range(2)]
    batch = scheduler.schedule()
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    assert ahead.sequences[0].num_cached_tokens == 7
    assert scheduler.abort(sequences[0].seq_id)
    scheduler.preempt_failed(batch)
    assert list(scheduler.waiting) == [sequences[1]]
    assert scheduler.commit_async_batch(ahead).is_empty
    assert scheduler.schedule().num_scheduled_tokens == (8,)
    check_invariants(scheduler.block_manager, scheduler.running)


def test_after_a_failed_step_only_its_sequences_and_those_of_the_step_ahead_are_computed_again() -> None:
    """The blocks of all steps before it stay in the prefix cache, whatever failed earlier."""
    scheduler = make_scheduler(32, 4, max_num_batched_tokens=8, max_num_seqs=8)
    first, second = (add_prompt(scheduler, 8, index, max_tokens=9) for index in range(2))
    batch = scheduler.schedule()
    ahead = scheduler.schedule_next_async(batch)
    assert (batch.sequences, ahead.sequences if ahead else None) == ((first,), (second,))
    scheduler.preempt_failed(batch)
    assert list(scheduler.waiting) == [first, second]
    for _ in range(2):
        step(scheduler)
    assert list(scheduler.running) == [first, second]
    third = add_prompt(scheduler, 8, 2, max_tokens=9)
    scheduler.preempt_failed(scheduler.schedule())
    assert (list(scheduler.running), list(scheduler.waiting)) == ([first, second], [third])
    scheduler.preempt(second)
    assert scheduler.block_manager.find_cached_blocks(second), "nothing was entered before it was computed"


@pytest.mark.parametrize(("max_tokens", "num_ahead", "num_admitted"), [(1, None, 2), (2, 1, 1)])
def test_a_prefill_is_not_chosen_ahead_while_a_sequence_is_about_to_free_its_blocks(
    max_tokens: int, num_ahead: int | None, num_admitted: int
) -> None:
    """With these blocks schedule() admits both prompts that wait; without them, one has room."""
    chosen = []
    for is_ahead in (True, False):
        scheduler = make_scheduler(6, 4, max_num_batched_tokens=16)
        add_prompt(scheduler, 8, 0, max_tokens=max_tokens)
        batch = scheduler.schedule()
        for index in (1, 2):
            add_prompt(scheduler, 8, index, max_tokens=1)
        ahead = scheduler.schedule_next_async(batch) if is_ahead else None
        assert not is_ahead or (None if ahead is None else len(ahead.sequences)) == num_ahead
        scheduler.postprocess(batch, [7])
        after = scheduler.schedule() if ahead is None else scheduler.commit_async_batch(ahead)
        chosen.append([seq.seq_id for seq in after.sequences])
    assert chosen[0] == chosen[1] == [1, 2][:num_admitted]


@pytest.mark.parametrize(
    ("max_num_seqs", "max_tokens", "is_known"),
    [(3, 9, False), (2, 3, True), (2, 2, False)],
    ids=["can be admitted", "no place", "a place becomes free"],
)
def test_the_step_after_a_decode_step_is_not_known_while_a_waiting_sequence_may_be_admitted(
    max_num_seqs: int, max_tokens: int, is_known: bool
) -> None:
    scheduler = make_scheduler(max_num_seqs=max_num_seqs)
    for index, most in enumerate((max_tokens, 9)):
        add_prompt(scheduler, 3, index, max_tokens=most)
    step(scheduler)
    batch = scheduler.schedule()
    assert not batch.is_prefill
    add_prompt(scheduler, 3, 2, max_tokens=9)
    assert (scheduler.schedule_next_async(batch) is not None) is is_known


@pytest.mark.parametrize(("num_free", "is_known"), [(1, False), (2, True)])
def test_no_block_is_allocated_unless_all_can_be(num_free: int, is_known: bool) -> None:
    """Two prompts of four fill a block each, and outgrow it."""
    scheduler = make_scheduler(5, 4)
    sequences = [add_prompt(scheduler, 4, index, max_tokens=4) for index in range(2)]
    batch = scheduler.schedule()
    allocated(scheduler.block_manager, [1] * 4 * (3 - num_free))
    assert scheduler.block_manager.num_free_blocks == num_free
    assert (scheduler.schedule_next_async(batch) is not None) is is_known
    assert [len(seq.block_table) for seq in sequences] == ([2, 2] if is_known else [1, 1])
