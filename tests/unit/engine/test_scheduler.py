"""Scheduler: its policy, case by case. test_state_machine.py holds what must be true of every run."""

from itertools import pairwise

import pytest

from nanovllm.engine.scheduler import MAX_CONSECUTIVE_PREFILLS, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from tests.support.scheduling import add_prompt, make_scheduler, run, step


def shape(scheduler: Scheduler) -> list[tuple[str, list[tuple[int, int]]]]:
    """The rest of the run: prefill or decode, and (seq_id, number of tokens) of each sequence of each step."""
    return [
        (
            "p" if batch.is_prefill else "d",
            [(s.seq_id, n) for s, n in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)],
        )
        for batch in run(scheduler)
    ]


# --- prefill, decode, budgets ---


def test_prompts_prefill_together_and_then_decode_together() -> None:
    scheduler = make_scheduler()
    add_prompt(scheduler, 3, 0, max_tokens=3)
    add_prompt(scheduler, 5, 1, max_tokens=2)
    assert shape(scheduler) == [("p", [(0, 3), (1, 5)]), ("d", [(0, 1), (1, 1)]), ("d", [(0, 1)])]


def test_a_prompt_longer_than_the_budget_is_cut_and_the_next_one_takes_what_is_left() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=4)
    first = add_prompt(scheduler, 10, 0, max_tokens=1)
    add_prompt(scheduler, 3, 1, max_tokens=1)
    batch = step(scheduler)
    assert (batch.num_scheduled_tokens, batch.sampled_sequences, batch.num_tokens) == ((4,), (), 4)
    assert (first.num_cached_tokens, first.num_completion_tokens) == (4, 0)
    assert shape(scheduler) == [("p", [(0, 4)]), ("p", [(0, 2), (1, 2)]), ("d", [(1, 1)])]
    assert scheduler.num_prefill_chunks == 3


def test_tokens_are_counted_after_the_prefix_was_found_and_blocks_were_given() -> None:
    """D06: of 7 tokens 4 are cached, so 3 are scheduled."""
    scheduler = make_scheduler(block_size=2)
    add_prompt(scheduler, 7, 0, max_tokens=1)
    run(scheduler)
    again = add_prompt(scheduler, 5, 0, max_tokens=1)
    batch = scheduler.schedule()
    assert batch.num_scheduled_tokens == (1,)
    assert (again.num_cached_tokens, again.num_cached_prompt_tokens, len(again.block_table)) == (4, 4, 3)


def test_max_num_seqs_bounds_the_running_set() -> None:
    """D16."""
    scheduler = make_scheduler(max_num_seqs=3)
    for seq_id in range(7):
        add_prompt(scheduler, 2, seq_id, max_tokens=2 + seq_id)
    sizes = []
    while not scheduler.is_finished:
        step(scheduler)
        sizes.append(len(scheduler.running))
    assert max(sizes) == 3


def test_the_head_of_the_line_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=2)
    seqs = [add_prompt(scheduler, num_tokens, i, max_tokens=3) for i, num_tokens in enumerate((6, 8, 1))]
    step(scheduler)
    assert list(scheduler.running) == seqs[:1], "the second does not fit beside it, and the third waits its turn"


def test_decoding_gets_its_turn_under_steady_arrivals() -> None:
    """D15: a newcomer at every step, and still at most MAX_CONSECUTIVE_PREFILLS steps between two tokens."""
    scheduler = make_scheduler(num_blocks=200, max_num_seqs=64, max_num_batched_tokens=64)
    first = add_prompt(scheduler, 2, 0, max_tokens=50)
    steps_with_token = []
    for arrival in range(1, 60):
        if first in step(scheduler).sampled_sequences:
            steps_with_token.append(arrival)
        add_prompt(scheduler, 2, arrival, max_tokens=50)
    gaps = [later - earlier for earlier, later in pairwise(steps_with_token)]
    assert len(gaps) > 4
    assert max(gaps) == MAX_CONSECUTIVE_PREFILLS + 1


def test_prompts_come_first_until_decoding_is_due() -> None:
    """D15: from the very first step on."""
    scheduler = make_scheduler(num_blocks=200, max_num_seqs=64)
    kinds = []
    for arrival in range(MAX_CONSECUTIVE_PREFILLS + 2):
        add_prompt(scheduler, 2, arrival, max_tokens=50)
        kinds.append(step(scheduler).is_prefill)
    assert kinds == [True] * MAX_CONSECUTIVE_PREFILLS + [False, True]


def test_a_prompt_with_chunks_to_come_is_not_decoded() -> None:
    """Decoding is due in the midst of a long prompt, which sits it out."""
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=2)
    first = add_prompt(scheduler, 2, 0, max_tokens=9)
    second = add_prompt(scheduler, 40, 1, max_tokens=9)
    batches = [step(scheduler) for _ in range(MAX_CONSECUTIVE_PREFILLS + 2)]
    assert [batch.is_prefill for batch in batches] == [True] * MAX_CONSECUTIVE_PREFILLS + [False, True]
    assert batches[-2].sequences == (first,)
    assert batches[-1].sequences == (second,)


def test_an_empty_schedule_is_legal() -> None:
    """D19."""
    scheduler = make_scheduler()
    batch = scheduler.schedule()
    assert (batch.is_empty, batch.num_tokens, batch.sequences) == (True, 0, ())
    scheduler.postprocess(batch, [])
    assert scheduler.is_finished


# --- blocks: the pool, the reserve, preemption ---


def test_an_exactly_full_pool_preempts_nobody() -> None:
    """D02: the fourth token of each fits into the block of its third."""
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    add_prompt(scheduler, 3, 0, max_tokens=2)
    add_prompt(scheduler, 3, 1, max_tokens=2)
    assert shape(scheduler) == [("p", [(0, 3), (1, 3)]), ("d", [(0, 1), (1, 1)])]
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(("num_blocks", "num_admitted"), [(5, 1), (6, 2)])
def test_a_block_stays_free_for_each_that_will_grow(num_blocks: int, num_admitted: int) -> None:
    """D17: two prompts of 2 full blocks each."""
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=2)
    add_prompt(scheduler, 4, 0, max_tokens=5)
    add_prompt(scheduler, 4, 1, max_tokens=5)
    assert len(scheduler.schedule().sequences) == num_admitted


def test_no_block_is_kept_for_those_that_will_not_grow() -> None:
    """D17: the one token each samples is never stored."""
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    add_prompt(scheduler, 4, 0, max_tokens=1)
    add_prompt(scheduler, 4, 1, max_tokens=1)
    assert len(scheduler.schedule().sequences) == 2


def test_a_block_that_the_next_token_opens_is_kept_free_too() -> None:
    """D17: the first sequence is about to open its last block. The second, admitted now, must not take it."""
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    add_prompt(scheduler, 4, 0, max_tokens=3)
    step(scheduler)
    second = add_prompt(scheduler, 3, 1, max_tokens=2)
    batch = step(scheduler)
    assert not batch.is_prefill, "4 blocks: 2 are taken, 1 will be, and the second needs 2"
    run(scheduler)
    assert scheduler.num_preemptions == 0
    assert second.num_completion_tokens == 2


def outgrowing(num_blocks: int = 8) -> tuple[Scheduler, list[Sequence]]:
    """Four requests that are admitted together and outgrow the pool."""
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=2)
    return scheduler, [add_prompt(scheduler, 2, seq_id, max_tokens=12) for seq_id in range(4)]


def test_preemptions_are_counted_and_bounded() -> None:
    """D17: a sequence gets block_size tokens at least between two preemptions."""
    scheduler, seqs = outgrowing()
    num_preemptions = 0
    while not scheduler.is_finished:
        before = list(scheduler.running)
        step(scheduler)
        num_preemptions += sum(seq.status is SequenceStatus.WAITING for seq in before)
    assert 1 < num_preemptions <= len(seqs) * 12 // 2
    assert scheduler.num_preemptions == num_preemptions


def test_the_last_admitted_is_preempted_and_goes_to_the_front_of_waiting() -> None:
    scheduler, seqs = outgrowing()
    late = add_prompt(scheduler, 2, 9, max_tokens=2)
    while not scheduler.num_preemptions:
        step(scheduler)
        order = [*scheduler.running, *scheduler.waiting]
        assert order == [*seqs, late]
    victim = scheduler.waiting[0]
    assert victim is not late
    assert (victim.status, victim.block_table, victim.num_cached_tokens) == (SequenceStatus.WAITING, [], 0)
    assert victim.num_completion_tokens > 0
    assert {seq.num_scheduled_tokens for seq in (*scheduler.running, *scheduler.waiting)} == {0}


def test_recomputing_ends_where_never_having_been_preempted_ends() -> None:
    """D08."""
    scheduler, tight = outgrowing()
    run(scheduler)
    roomy_scheduler, roomy = outgrowing(num_blocks=100)
    run(roomy_scheduler)
    assert scheduler.num_preemptions > roomy_scheduler.num_preemptions == 0
    assert [seq.token_ids for seq in tight] == [seq.token_ids for seq in roomy]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
def test_state_after_preemption_and_recomputing(num_steps: int) -> None:
    """D08: one prefill step later it stands one token further, as one decode step would have it."""
    pair = []
    for is_preempted in (False, True):
        scheduler = make_scheduler(block_size=2)
        seq = add_prompt(scheduler, 3, max_tokens=20)
        for _ in range(num_steps):
            step(scheduler)
        if is_preempted:
            scheduler.preempt(seq)
        step(scheduler)
        pair.append((seq.token_ids, seq.num_cached_tokens, seq.num_tokens_with_kv, len(seq.block_table), seq.status))
        assert seq.num_cached_prompt_tokens == 0, "what the first admission found, not what was recomputed"
    assert pair[0] == pair[1]
