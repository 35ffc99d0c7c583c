"""Scheduler.schedule_next_async and commit_async_batch by hand: when the next step is known before the tokens of this one, and what if
one of them ends a sequence.
"""

from typing import Any

import numpy as np
import pytest

from nanovllm.engine.model_input import PLACEHOLDER_TOKEN, prepare_decode, prepare_decode_async
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from tests.support.counts import count_comparisons
from tests.support.scheduling import add_prompt, allocated, make_scheduler, step
from tests.unit.engine.test_model_input import as_lists

EOS = 0


def started(num_seqs: int = 3, max_tokens: int = 9, **limits: Any) -> tuple[Scheduler, list[Sequence], ScheduledBatch]:
    """Sequences of 3, 4, ... tokens, and the prefill of all of them, scheduled and not taken in."""
    scheduler = make_scheduler(**limits, eos_token_ids=frozenset({EOS}))
    sequences = [add_prompt(scheduler, 3 + index, index, max_tokens=max_tokens) for index in range(num_seqs)]
    return scheduler, sequences, scheduler.schedule()


def test_the_decode_step_after_a_prefill_is_known() -> None:
    scheduler, sequences, batch = started()
    ahead = scheduler.schedule_next_async(batch)
    assert ahead == ScheduledBatch(False, tuple(sequences), (1, 1, 1), tuple(sequences))
    assert [len(seq.block_table) for seq in sequences] == [1, 2, 2], "blocks of 4: tokens 4, 5 and 6"
    scheduler.postprocess(batch, [7, 8, 9])
    assert scheduler.commit_async_batch(ahead) == ahead
    scheduler.postprocess(ahead, [1, 2, 3])
    assert [seq.completion_token_ids for seq in sequences] == [[7, 1], [8, 2], [9, 3]]
    assert [seq.num_cached_tokens for seq in sequences] == [4, 5, 6]
    scheduler.block_manager.check_invariants(sequences)


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_its_input_is_what_prepare_decode_makes_of_it_later(num_steps: int) -> None:
    """But for the tokens, which it names by their rows of the step before. One sequence was decoding when the others
    were admitted: its token is known.
    """
    scheduler, sequences, batch = started(max_num_seqs=4)
    scheduler.postprocess(batch, [5, 6, 7])
    for _ in range(num_steps - 1):
        step(scheduler)
    sequences.append(add_prompt(scheduler, 2, 3, max_tokens=9))
    batch = scheduler.schedule()
    assert batch.sequences == (sequences[-1],)
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    before = prepare_decode_async(ahead.sequences, batch.sampled_sequences)
    scheduler.postprocess(batch, [8])
    after = prepare_decode(scheduler.commit_async_batch(ahead).sequences)
    assert before.input_ids_source is not None
    assert before.input_ids_source.tolist() == [-1, -1, -1, 0]
    assert before.input_ids.tolist() == [*after.input_ids[:3], PLACEHOLDER_TOKEN]
    assert after.input_ids[3] == 8
    differing = {name for name, value in as_lists(before).items() if value != as_lists(after)[name]}
    assert differing == {"input_ids", "input_ids_source"}
    for name, rows in vars(after.sampling).items():
        assert np.array_equal(getattr(before.sampling, name), rows), name
        assert getattr(before.sampling, name).dtype == rows.dtype
    count_comparisons("prepare_decode_async against prepare_decode", len(ahead.sequences))


def test_unknown_tokens_are_named_by_their_rows() -> None:
    """Whoever ends by length has no row in the step ahead, and the others' rows are those of the step before."""
    scheduler = make_scheduler()
    sequences = [add_prompt(scheduler, 3, index, max_tokens=n) for index, n in enumerate((1, 5, 1, 5))]
    batch = scheduler.schedule()
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    assert ahead.sequences == (sequences[1], sequences[3])
    input_ids_source = prepare_decode_async(ahead.sequences, batch.sampled_sequences).input_ids_source
    assert input_ids_source is not None
    assert input_ids_source.tolist() == [1, 3]


def test_who_is_ended_by_a_token_drops_out() -> None:
    """D11: the others go on, and what was computed for it is nobody's."""
    scheduler, sequences, batch = started()
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    scheduler.postprocess(batch, [7, EOS, 9])
    assert sequences[1].finish_reason == "stop"
    current = scheduler.commit_async_batch(ahead)
    assert current.sequences == current.sampled_sequences == (sequences[0], sequences[2])
    assert scheduler.abort(2)
    assert current.num_scheduled_tokens == (1, 1)
    scheduler.postprocess(current, [1, 3])
    assert sequences[0].completion_token_ids == [7, 1]
    assert sequences[2].completion_token_ids == [9]
    scheduler.block_manager.check_invariants(scheduler.running)


def test_nothing_is_left_to_take_up_when_all_have_ended() -> None:
    scheduler, _, batch = started()
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    scheduler.postprocess(batch, [EOS] * 3)
    assert scheduler.commit_async_batch(ahead).is_empty
    assert scheduler.block_manager.num_free_blocks == len(scheduler.block_manager.blocks)


def test_who_was_preempted_meanwhile_is_not_taken_up() -> None:
    """It has no blocks any more."""
    scheduler, sequences, batch = started()
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    scheduler.postprocess(batch, [7, 8, 9])
    scheduler.preempt(sequences[2])
    assert scheduler.commit_async_batch(ahead).sequences == tuple(sequences[:2])


# --- when it is not known ---


def test_not_when_all_end_by_length() -> None:
    scheduler, _, batch = started(max_tokens=1)
    assert scheduler.schedule_next_async(batch) is None


def test_not_beyond_the_model_s_length() -> None:
    scheduler, sequences, batch = started(max_model_len=6)
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    assert ahead.sequences == tuple(sequences[:2]), "the third has 5 tokens, and 6 with the next one"


def test_not_while_a_prompt_has_tokens_left() -> None:
    scheduler, sequences, batch = started(max_num_batched_tokens=8, max_num_seqs=8)
    assert sequences[2].num_scheduled_tokens == 1
    assert scheduler.schedule_next_async(batch) is None


def test_the_last_token_of_a_prompt_is_decoded() -> None:
    """As schedule() does it: exactly one token is left."""
    scheduler, sequences, batch = started(max_num_batched_tokens=11, max_num_seqs=8)
    assert sequences[2].num_scheduled_tokens == 4
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    inputs = prepare_decode_async(ahead.sequences, batch.sampled_sequences)
    assert inputs.input_ids.tolist() == [PLACEHOLDER_TOKEN, PLACEHOLDER_TOKEN, sequences[2].token_ids[4]]
    assert inputs.positions.tolist() == [3, 4, 4]


def test_not_when_a_waiting_sequence_can_be_admitted() -> None:
    """Prefill first, as always."""
    scheduler, _, batch = started()
    add_prompt(scheduler, 3, 3)
    assert scheduler.schedule_next_async(batch) is None


@pytest.mark.parametrize(("max_tokens", "is_known"), [(2, True), (1, False)])
def test_waiting_for_a_place_holds_up_nobody_until_one_becomes_free(max_tokens: int, is_known: bool) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for index, most in enumerate((max_tokens, 9, 9)):
        add_prompt(scheduler, 3, index, max_tokens=most)
    batch = scheduler.schedule()
    assert len(scheduler.waiting) == 1
    assert (scheduler.schedule_next_async(batch) is not None) is is_known


@pytest.mark.parametrize(("num_free", "is_known"), [(1, False), (2, True)])
def test_not_when_blocks_do_not_suffice(num_free: int, is_known: bool) -> None:
    """Two prompts of four fill a block each, and outgrow it. Nothing is taken before all can be."""
    scheduler = make_scheduler(5, 4)
    sequences = [add_prompt(scheduler, 4, index, max_tokens=4) for index in range(2)]
    batch = scheduler.schedule()
    allocated(scheduler.block_manager, [1] * 4 * (3 - num_free))
    assert scheduler.block_manager.num_free_blocks == num_free
    assert (scheduler.schedule_next_async(batch) is not None) is is_known
    assert [len(seq.block_table) for seq in sequences] == ([2, 2] if is_known else [1, 1])


def test_it_counts_as_a_decode_step() -> None:
    """D15: prefills may follow it as they may follow any."""
    scheduler, _, batch = started()
    scheduler._num_consecutive_prefills = 8
    assert scheduler.schedule_next_async(batch) is not None
    assert scheduler._num_consecutive_prefills == 0
