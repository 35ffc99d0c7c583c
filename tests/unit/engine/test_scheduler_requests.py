"""Scheduler: which requests it admits, and how they end."""

from typing import Any

import pytest

from nanovllm.engine.sequence import SequenceStatus
from tests.support.scheduling import add_prompt, make_scheduler, run, step

# --- admission ---


def test_what_can_never_fit_is_refused_with_the_numbers_and_the_others_go_on() -> None:
    """D10."""
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    other = add_prompt(scheduler, 2, 0, max_tokens=7)
    with pytest.raises(
        ValueError,
        match=r"4 blocks of 2 tokens, got 5 prompt tokens and max_tokens=5 .* take 5 blocks; lower max_tokens to 4, or "
        r"set num_kv_cache_blocks to at least 5$",
    ):
        add_prompt(scheduler, 5, 1, max_tokens=5)
    assert add_prompt(scheduler, 5, 2, max_tokens=4) in scheduler.waiting
    run(scheduler)
    assert other.num_completion_tokens == 7


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


def test_max_model_len_caps_what_is_asked_of_the_pool() -> None:
    """D10, D11: max_tokens may be anything, the sequence ends at max_model_len."""
    scheduler = make_scheduler(num_blocks=2, block_size=4, max_model_len=9)
    seq = add_prompt(scheduler, 4, max_tokens=10**9)
    run(scheduler)
    assert (len(seq), seq.finish_reason) == (9, "length")


# --- finish ---


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "num_tokens"),
    [
        ({"max_tokens": 3}, [1, 1, 1, 1], "length", 3),
        ({"max_tokens": 9}, [1, 7, 1, 1], "stop", 2),
        ({"max_tokens": 9}, [1, 8, 1, 1], "stop", 2),
        ({"max_tokens": 3, "ignore_eos": True}, [1, 7, 8, 1], "length", 3),
        ({"max_tokens": 9, "stop_token_ids": (5,)}, [1, 1, 5, 1], "stop", 3),
        ({"max_tokens": 9, "stop_token_ids": (5,), "ignore_eos": True}, [7, 5, 1, 1], "stop", 2),
        ({"max_tokens": 2}, [1, 7], "stop", 2),
        ({"max_tokens": 99}, [1] * 8, "length", 6),
    ],
)
def test_finish_reasons(params: dict[str, Any], tokens: list[int], reason: str, num_tokens: int) -> None:
    """D11, D70: any of several eos ids, stop tokens, max_tokens, max_model_len = 10 with a prompt of 4."""
    scheduler = make_scheduler(max_model_len=10, eos_token_ids=frozenset({7, 8}))
    seq = add_prompt(scheduler, 4, **params)
    run(scheduler, lambda seq: tokens[seq.num_completion_tokens])
    assert (seq.finish_reason, seq.num_completion_tokens, seq.status) == (reason, num_tokens, SequenceStatus.FINISHED)
    assert scheduler.block_manager.num_free_blocks == 64


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("is_between", "is_preempted"), [(False, False), (False, True), (True, False)])
def test_abort_ends_a_request_in_every_state(num_steps: int, is_between: bool, is_preempted: bool) -> None:
    """D18, D19: waiting (0 steps), between chunks (1, 2), decoding (3, 4), preempted, and during a step."""
    scheduler = make_scheduler(block_size=2, max_num_batched_tokens=4, max_num_seqs=2)
    seq, other = add_prompt(scheduler, 9, 0, max_tokens=9), add_prompt(scheduler, 3, 1, max_tokens=9)
    for _ in range(num_steps):
        step(scheduler)
    num_tokens = len(seq)
    if is_between:
        batch = scheduler.schedule()
        assert scheduler.abort(0)
        scheduler.postprocess(batch, [1] * len(batch.sampled_sequences))
    else:
        if is_preempted and seq in scheduler.running:
            scheduler.preempt(seq)
        assert scheduler.abort(0)
    assert (seq.finish_reason, seq.status, len(seq)) == ("abort", SequenceStatus.FINISHED, num_tokens)
    assert (seq.block_table, seq.num_scheduled_tokens) == ([], 0)
    assert not scheduler.abort(0)
    run(scheduler)
    assert (other.finish_reason, other.num_completion_tokens) == ("length", 9)
    assert scheduler.block_manager.num_free_blocks == 64


def test_an_unknown_or_finished_request_is_not_aborted() -> None:
    """D19."""
    scheduler = make_scheduler()
    seq = add_prompt(scheduler, 3, max_tokens=1)
    run(scheduler)
    assert not scheduler.abort(0)
    assert not scheduler.abort(77)
    assert seq.finish_reason == "length"


def test_postprocess_wants_one_token_for_each_sampled_sequence() -> None:
    scheduler = make_scheduler()
    add_prompt(scheduler, 3)
    batch = scheduler.schedule()
    with pytest.raises(ValueError, match="zip"):
        scheduler.postprocess(batch, [])
