"""Scheduler by hand: chunks, preemption, what is counted of them, and what is refused.

The policy is in reference/scheduler.py; test_scheduler_against_reference.py compares every decision with it.
"""

import pytest

from nanovllm.engine.scheduler import Scheduler
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


def test_a_prompt_longer_than_the_budget_is_cut_and_the_next_one_takes_the_rest() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=4)
    first = add_prompt(scheduler, 10, 0, max_tokens=1)
    add_prompt(scheduler, 3, 1, max_tokens=1)
    batch = step(scheduler)
    assert (batch.num_scheduled_tokens, batch.sampled_sequences, batch.num_tokens) == ((4,), (), 4)
    assert (first.num_cached_tokens, first.num_completion_tokens) == (4, 0)
    assert shape(scheduler) == [("p", [(0, 4)]), ("p", [(0, 2), (1, 2)]), ("d", [(1, 1)])]
    assert scheduler.num_prefill_chunks == 3


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
        assert not any(seq.num_scheduled_tokens for seq in scheduler.waiting)
    assert 1 < num_preemptions <= len(seqs) * 12 // 2
    assert scheduler.num_preemptions == num_preemptions
    roomy_scheduler, roomy = outgrowing(num_blocks=100)
    run(roomy_scheduler)
    assert roomy_scheduler.num_preemptions == 0
    assert [seq.token_ids for seq in seqs] == [seq.token_ids for seq in roomy]


def test_postprocess_wants_one_token_for_each_sampled_sequence() -> None:
    scheduler = make_scheduler()
    add_prompt(scheduler, 3)
    batch = scheduler.schedule()
    with pytest.raises(ValueError, match="zip"):
        scheduler.postprocess(batch, [])


@pytest.mark.parametrize(
    ("num_tokens", "remedy"),
    [(16, ", or set max_model_len to at least 17"), (17, ": this model takes at most 17 tokens")],
)
def test_a_prompt_without_room_for_one_more_token_is_refused(num_tokens: int, remedy: str) -> None:
    """D11."""
    scheduler = make_scheduler(max_model_len=16, max_supported_len=17)
    with pytest.raises(ValueError, match=f"max_model_len=16 tokens .* got {num_tokens}; shorten it{remedy}"):
        add_prompt(scheduler, num_tokens)
    add_prompt(scheduler, 15)
