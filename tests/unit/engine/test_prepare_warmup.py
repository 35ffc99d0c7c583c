"""prepare_warmup: the largest prefill and the most sampled rows that the limits allow, in one pass, nothing stored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.model_input import (
    LONG_CONTEXT,
    PADDING_SLOT,
    prepare_kinds_of_prefill,
    prepare_warmup,
    warmup_lengths,
)


@pytest.mark.parametrize(
    ("budget", "max_model_len", "max_num_seqs", "lengths"),
    [
        (16384, 4096, 512, [4096] * 4),
        (100, 30, 8, [30, 30, 30, 10]),
        (100, 30, 4, [30, 30, 30, 10]),
        (100, 30, 2, [30, 30]),
        (20, 30, 8, [20]),
        (8, 8, 8, [8]),
        (1, 2, 1, [1]),
    ],
)
def test_lengths_fill_the_budget_also_when_max_model_len_does_not_divide_it(
    budget: int, max_model_len: int, max_num_seqs: int, lengths: list[int]
) -> None:
    """D42."""
    assert warmup_lengths(budget, max_model_len, max_num_seqs) == lengths


@given(max_num_seqs=st.integers(1, 40), spare=st.integers(0, 60), max_model_len=st.integers(2, 50))
def test_no_step_within_the_limits_is_larger(max_num_seqs: int, spare: int, max_model_len: int) -> None:
    """D42: tokens, and rows for the sampler, each at its maximum."""
    budget = max_num_seqs + spare
    model_input = prepare_warmup(budget, max_model_len, max_num_seqs, block_size=16)
    num_tokens = min(budget, max_num_seqs * max_model_len)
    assert model_input.is_prefill
    assert len(model_input.input_ids) == model_input.cu_seqlens_q[-1] == num_tokens
    assert len(model_input.context_lens) <= max_num_seqs
    assert model_input.max_seqlen_q == min(budget, max_model_len)
    assert len(model_input.sample_indices) == max_num_seqs
    assert set(model_input.sample_indices) <= set(range(num_tokens))
    for row in vars(model_input.sampling).values():
        assert len(row) == max_num_seqs


def test_nothing_is_stored_and_no_block_is_read() -> None:
    """There is no cache yet."""
    model_input = prepare_warmup(100, 30, 8, block_size=16)
    assert set(model_input.slot_mapping.tolist()) == {PADDING_SLOT}
    assert model_input.block_tables is None


def test_every_filter_of_the_sampler_is_on() -> None:
    """D42: sampling with filters takes the most memory."""
    sampling = prepare_warmup(100, 30, 8, block_size=16).sampling
    assert (sampling.top_k > 1).all()
    assert (sampling.top_p < 1).all()
    assert (sampling.min_p > 0).all()


@pytest.mark.parametrize("block_size", [16, 256, 1024])
def test_the_other_kinds_of_prefill(block_size: int) -> None:
    """Few keys, few cached ones, many cached ones; nothing is stored, and every block is one of the cache."""
    num_blocks = -(-(LONG_CONTEXT + 1) // block_size)
    kinds = prepare_kinds_of_prefill(LONG_CONTEXT + 1, num_blocks, block_size)  # just room for the longest
    assert [(kind.max_seqlen_q, kind.max_seqlen_k) for kind in kinds] == [(2, 2), (1, 2), (1, LONG_CONTEXT + 1)]
    assert [kind.block_tables is None for kind in kinds] == [True, False, False]
    for kind in kinds:
        assert kind.is_prefill
        assert (kind.slot_mapping == PADDING_SLOT).all()
        assert kind.block_tables is None or kind.block_tables.max() < num_blocks


@pytest.mark.parametrize(("max_model_len", "num_blocks"), [(LONG_CONTEXT, 100), (4096, 2)])
def test_kinds_for_which_there_is_no_room_are_left_out(max_model_len: int, num_blocks: int) -> None:
    kinds = prepare_kinds_of_prefill(max_model_len, num_blocks, 256)
    assert [kind.max_seqlen_k for kind in kinds] == [2, 2]


def test_a_long_context_is_what_the_kernel_takes_for_one() -> None:
    pytest.importorskip("triton")
    from nanovllm.kernels.varlen_attention import MIN_HOPPER_KEYS

    assert LONG_CONTEXT == MIN_HOPPER_KEYS
