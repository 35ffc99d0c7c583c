"""Scheduler: which requests it admits, and how they end."""

from typing import Any

import pytest

from nanovllm.engine.sequence import SequenceStatus
from tests.support.scheduling import add_prompt, make_scheduler, run

# --- admission ---


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


def test_postprocess_wants_one_token_for_each_sampled_sequence() -> None:
    scheduler = make_scheduler()
    add_prompt(scheduler, 3)
    batch = scheduler.schedule()
    with pytest.raises(ValueError, match="zip"):
        scheduler.postprocess(batch, [])
