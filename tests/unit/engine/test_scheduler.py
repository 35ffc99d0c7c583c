"""Scheduler: its policy, case by case. test_scheduler_against_reference.py compares it over drawn runs."""

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


def test_a_prompt_longer_than_the_budget_is_cut_and_the_next_one_takes_the_rest() -> None:
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


def test_prompts_have_priority_until_a_decode_step_is_due() -> None:
    """D15: beside a prompt of many chunks, which is not decoded before its last one."""
    scheduler = make_scheduler(num_blocks=1000, max_num_batched_tokens=8, max_model_len=4000)
    first = add_prompt(scheduler, 2, 0, max_tokens=50)
    batches = [step(scheduler)]
    add_prompt(scheduler, 400, 1, max_tokens=1)
    batches += [step(scheduler) for _ in range(2 * MAX_CONSECUTIVE_PREFILLS)]
    period = [True] * MAX_CONSECUTIVE_PREFILLS + [False]
    assert [batch.is_prefill for batch in batches] == (2 * period)[: len(batches)]
    assert all(batch.is_prefill or batch.sequences == (first,) for batch in batches)


def test_an_empty_schedule_is_legal() -> None:
    """D19."""
    scheduler = make_scheduler()
    batch = scheduler.schedule()
    assert (batch.is_empty, batch.num_tokens, batch.sequences) == (True, 0, ())
    scheduler.postprocess(batch, [])
    assert scheduler.is_finished


# --- blocks: the pool, the reserve, preemption ---


@pytest.mark.parametrize(
    ("num_blocks", "max_tokens", "max_model_len", "num_admitted"),
    [
        (5, 5, 64, 1),
        (6, 5, 64, 2),
        (4, 1, 64, 2),  # the token that each samples is never stored
        (4, 9, 5, 2),  # nor the one at max_model_len
    ],
)
def test_a_block_stays_free_for_each_sequence_that_will_grow(
    num_blocks: int, max_tokens: int, max_model_len: int, num_admitted: int
) -> None:
    """D17: two prompts of 2 full blocks each."""
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=2, max_model_len=max_model_len)
    add_prompt(scheduler, 4, 0, max_tokens=max_tokens)
    add_prompt(scheduler, 4, 1, max_tokens=max_tokens)
    assert len(scheduler.schedule().sequences) == num_admitted


def outgrowing(num_blocks: int = 8) -> tuple[Scheduler, list[Sequence]]:
    """Four requests that are admitted together and outgrow the pool."""
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=2)
    return scheduler, [add_prompt(scheduler, 2, seq_id, max_tokens=12) for seq_id in range(4)]


def test_preemptions_are_counted_and_bounded_and_leave_no_trace_in_the_tokens() -> None:
    """D08, D17: a sequence gets at least block_size tokens between two preemptions."""
    scheduler, seqs = outgrowing()
    num_preemptions = 0
    while not scheduler.is_finished:
        before = list(scheduler.running)
        step(scheduler)
        num_preemptions += sum(seq.status is SequenceStatus.WAITING for seq in before)
    assert 1 < num_preemptions <= len(seqs) * 12 // 2
    assert scheduler.num_preemptions == num_preemptions
    roomy_scheduler, roomy = outgrowing(num_blocks=100)
    run(roomy_scheduler)
    assert roomy_scheduler.num_preemptions == 0
    assert [seq.token_ids for seq in seqs] == [seq.token_ids for seq in roomy]


def test_the_last_admitted_is_preempted_and_goes_to_the_front_of_waiting() -> None:
    scheduler, seqs = outgrowing()
    late = add_prompt(scheduler, 2, 9, max_tokens=2)
    while not scheduler.num_preemptions:
        step(scheduler)
        assert [*scheduler.running, *scheduler.waiting] == [*seqs, late]
    victim = scheduler.waiting[0]
    assert victim is not late
    assert (victim.status, victim.block_table, victim.num_cached_tokens) == (SequenceStatus.WAITING, [], 0)
    assert victim.num_completion_tokens > 0
    assert {seq.num_scheduled_tokens for seq in (*scheduler.running, *scheduler.waiting)} == {0}
