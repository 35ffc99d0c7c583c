"""prepare_profile_run: the largest prefill and the most sampled rows that the limits allow, in one pass, nothing stored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.model_input import PADDING_SLOT
from nanovllm.worker.warmup import LONG_CONTEXT, prefill_warmup_shapes, prepare_profile_run, warmup_lengths


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
    model_input = prepare_profile_run(budget, max_model_len, max_num_seqs, block_size=16)
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
    model_input = prepare_profile_run(100, 30, 8, block_size=16)
    assert set(model_input.slot_mapping.tolist()) == {PADDING_SLOT}
    assert model_input.block_tables is None


def test_every_filter_of_the_sampler_is_on() -> None:
    """D42: sampling with filters takes the most memory."""
    sampling = prepare_profile_run(100, 30, 8, block_size=16).sampling
    assert (sampling.top_k > 1).all()
    assert (sampling.top_p < 1).all()
    assert (sampling.min_p > 0).all()


@given(
    budget=st.integers(1, 5000),
    max_num_seqs=st.integers(1, 40),
    max_model_len=st.integers(2, 700),
    num_blocks=st.integers(1, 9),
    block_size=st.sampled_from([16, 256, 1024]),
)
def test_the_other_kinds_of_prefill(
    budget: int, max_num_seqs: int, max_model_len: int, num_blocks: int, block_size: int
) -> None:
    """Nothing is stored, every block is one of the cache, and the limits hold; each kind that they allow is there."""
    kinds = list(prefill_warmup_shapes(budget, max_model_len, max_num_seqs, num_blocks, block_size))
    for kind in kinds:
        assert kind.is_prefill
        assert (kind.slot_mapping == PADDING_SLOT).all()
        assert kind.block_tables is None or kind.block_tables.max() < num_blocks
        assert len(kind.input_ids) == len(kind.positions) <= budget
        assert kind.max_seqlen_k <= min(max_model_len, num_blocks * block_size)
        assert len(kind.sample_indices) == len(kind.context_lens) <= max_num_seqs
        assert (kind.sampling.top_k == 0).all()
    met = {(len(kind.input_ids), int(kind.context_lens[0] - kind.cu_seqlens_q[1])) for kind in kinds}
    assert len(met) == len(kinds)
    most = min(max_model_len, num_blocks * block_size)
    for cached in (0, 1):
        for num_tokens in (2**power for power in range(13)):
            fits = num_tokens <= min(budget, most - cached)  # in one sequence
            assert ((num_tokens, cached) in met) or not fits
    assert ((1, LONG_CONTEXT) in met) == (most > LONG_CONTEXT)


def test_many_tokens_are_those_of_several_sequences() -> None:
    """As the real ones are: 16384 tokens of a model that takes 4096 at most. They come first."""
    fresh, cached, *_, long = prefill_warmup_shapes(20000, 4096, 256, 100, 256)
    assert fresh.cu_seqlens_q.tolist() == fresh.cu_seqlens_k.tolist() == [0, 4096, 8192, 12288, 16384]
    assert fresh.block_tables is None
    assert cached.cu_seqlens_q.tolist() == [0, 4095, 8190, 12285, 16380, 16384]
    assert cached.context_lens.tolist() == [4096] * 4 + [5]
    assert (long.max_seqlen_q, long.max_seqlen_k) == (1, LONG_CONTEXT + 1)


@pytest.mark.parametrize(("max_model_len", "num_blocks", "is_met"), [(512, 3, False), (513, 3, True), (513, 2, False)])
def test_a_long_context_needs_room_for_one_token_more(max_model_len: int, num_blocks: int, is_met: bool) -> None:
    *_, last = prefill_warmup_shapes(8, max_model_len, 4, num_blocks, block_size=256)
    assert (last.max_seqlen_k == LONG_CONTEXT + 1) is is_met


def test_a_long_context_is_what_the_kernel_takes_for_one() -> None:
    pytest.importorskip("triton")
    from nanovllm.kernels.varlen_attention import MIN_HOPPER_KEYS

    assert LONG_CONTEXT == MIN_HOPPER_KEYS
