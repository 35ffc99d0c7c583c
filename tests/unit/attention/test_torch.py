"""Attention and its torch backend against reference.paged_attention, over a cache whose other slots are NaN (D53)."""

import dataclasses

import pytest
import torch

from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.context import get_context, set_context
from nanovllm.layers import torch_attention
from nanovllm.layers.attention import Attention
from reference.packing import varlen_attention
from reference.paged_attention import paged_attention
from tests.support.attention_cases import (
    Case,
    assert_same_bits,
    assert_within_twice_the_error_of_plain_torch,
    make_step,
    running_sum,
)
from tests.support.comparing import assert_close
from tests.support.counts import count_comparisons

WHOLE_PROMPTS = ((5, 5), (1, 1), (33, 33), (16, 16))
PREFIX_HITS_AND_CHUNKS = ((5, 21), (1, 16), (17, 17), (3, 40), (1, 1), (16, 32))
DECODES = ((1, 1), (1, 2), (1, 16), (1, 17), (1, 45))
STEPS = {
    "prefill": Case(WHOLE_PROMPTS),
    "prefill over cached keys": Case(PREFIX_HITS_AND_CHUNKS),
    "decode": Case(DECODES, is_prefill=False),
}
each_step = pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)

# float64 has 2**-53 of rounding; scores and sums of at most 300 terms of size 5 stay below 1e5 of them.
ATTENTION = "attention: torch backend against the reference, float64"
FLOAT64_TOLERANCE = 1e5 * 2**-53


def assert_attends_like_the_reference(case: Case) -> None:
    step = make_step(case)
    k_cache, v_cache = step.expected_caches()
    expected = step.expected_output()
    output = step.run(TorchAttentionBackend())
    assert output.shape == (sum(q_len for q_len, _ in case.lengths), case.num_heads, case.head_dim)
    assert_close(ATTENTION, output, expected, rtol=0, atol=FLOAT64_TOLERANCE)
    assert_same_bits(step.k_cache, k_cache)
    assert_same_bits(step.v_cache, v_cache)
    count_comparisons("attention: KV cache against reference.store_kvcache", 2 * k_cache.numel())


@pytest.mark.parametrize("num_kv_heads", [8, 4, 2, 1])
@each_step
def test_heads_share_kv_heads_in_order(case, num_kv_heads):
    """D53, and groups of 1, 2, 4 and 8 query heads a kv head."""
    assert_attends_like_the_reference(dataclasses.replace(case, num_heads=8, num_kv_heads=num_kv_heads))


@pytest.mark.parametrize("block_size", [1, 2, 16, 256])
@each_step
def test_any_block_size(case, block_size):
    assert_attends_like_the_reference(dataclasses.replace(case, block_size=block_size))


@pytest.mark.parametrize("head_dim", [1, 24, 128])
@each_step
def test_any_head_dim(case, head_dim):
    assert_attends_like_the_reference(dataclasses.replace(case, head_dim=head_dim))


@pytest.mark.parametrize("seed", range(4))
def test_long_sequences_cross_many_blocks(seed):
    lengths = ((7, 300), (290, 300), (1, 257), (64, 64))
    assert_attends_like_the_reference(Case(lengths, seed=seed))


def test_chunks_see_what_the_whole_prompt_sees():
    """D07: a prompt of 50 in chunks of 20, 20 and 10 gives the outputs and the cache of one prefill of 50."""
    whole = make_step(Case(((50, 50),), block_size=4))
    expected = whole.run(TorchAttentionBackend())
    slots = whole.context.slot_mapping
    chunked = make_step(Case(((50, 50),), block_size=4))
    outputs = []
    for start, end in [(0, 20), (20, 40), (40, 50)]:
        context = dataclasses.replace(
            whole.context,
            slot_mapping=slots[start:end],
            cu_seqlens_q=running_sum([end - start]),
            cu_seqlens_k=running_sum([end]),
            max_seqlen_q=end - start,
            max_seqlen_k=end,
            context_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=whole.block_tables,
        )
        tokens = slice(start, end)
        chunk = dataclasses.replace(
            chunked,
            query=whole.query[tokens],
            key=whole.key[tokens],
            value=whole.value[tokens],
            context=context,
        )
        outputs.append(chunk.run(TorchAttentionBackend()))
    assert_close(ATTENTION, torch.cat(outputs), expected, rtol=0, atol=FLOAT64_TOLERANCE)
    assert_same_bits(chunked.k_cache, whole.k_cache)


@each_step
def test_which_blocks_a_sequence_owns_changes_nothing(case):
    first, second = make_step(case, block_seed=1), make_step(case, block_seed=2)
    assert not torch.equal(first.block_tables, second.block_tables)
    assert_same_bits(first.run(TorchAttentionBackend()), second.run(TorchAttentionBackend()))


@pytest.mark.parametrize("limit", [1, 45, 100])
def test_decode_in_groups_of_sequences(monkeypatch, limit):
    """The longest of five sequences has 45 keys: groups of 1, 1 and 2 sequences."""
    monkeypatch.setattr(torch_attention, "MAX_GATHERED_TOKENS", limit)
    assert_attends_like_the_reference(STEPS["decode"])


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_prefill_in_slices_of_queries(monkeypatch, limit):
    monkeypatch.setattr(torch_attention, "MAX_MASKED_QUERIES", limit)
    assert_attends_like_the_reference(STEPS["prefill over cached keys"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_step
def test_error_in_lower_precision(case, dtype):
    step = make_step(dataclasses.replace(case, head_dim=64), dtype)
    expected = step.expected_output()
    assert_within_twice_the_error_of_plain_torch("torch backend", step, step.run(TorchAttentionBackend()), expected)


@pytest.mark.parametrize("padding", [[0], [2, 4], [0, 1, 2, 3, 4]])
def test_padded_tokens_are_not_stored(padding):
    """Slot -1 leaves the cache alone; whole-cache comparison, never-written slots included."""
    step = make_step(STEPS["decode"])
    slot_mapping = step.context.slot_mapping.clone()
    slot_mapping[padding] = -1
    step = dataclasses.replace(step, context=dataclasses.replace(step.context, slot_mapping=slot_mapping))
    k_cache, v_cache = step.expected_caches()
    TorchAttentionBackend().store(step.key, step.value, step.k_cache, step.v_cache, slot_mapping)
    assert_same_bits(step.k_cache, k_cache)
    assert_same_bits(step.v_cache, v_cache)


def test_the_first_slot_is_a_slot():
    step = make_step(Case(((2, 2),)))
    k_cache, v_cache = (torch.full_like(step.k_cache, torch.nan) for _ in "kv")
    TorchAttentionBackend().store(step.key, step.value, k_cache, v_cache, torch.tensor([0, 1]))
    assert torch.equal(k_cache.flatten(0, 1)[:2], step.key)
    assert torch.equal(v_cache.flatten(0, 1)[:2], step.value)


def test_last_token_of_a_cached_prompt_is_computed_without_being_stored():
    """D05, D14: one query, slot -1, all keys in the cache; a key that is wrong on purpose must not be seen."""
    stored = make_step(Case(((1, 32),)))
    expected = stored.run(TorchAttentionBackend())
    context = dataclasses.replace(stored.context, slot_mapping=torch.tensor([-1]))
    again = dataclasses.replace(stored, key=stored.key * torch.nan, value=stored.value * torch.nan, context=context)
    assert_same_bits(again.run(TorchAttentionBackend()), expected)


def test_cache_of_one_layer_leaves_the_others_alone():
    step = make_step(STEPS["decode"])
    caches = torch.full((2, 3, *step.k_cache.shape), torch.nan, dtype=torch.float64)
    TorchAttentionBackend().store(step.key, step.value, caches[0, 1], caches[1, 1], step.context.slot_mapping)
    slots = step.context.slot_mapping
    assert torch.equal(caches[0, 1].flatten(0, 1)[slots], step.key)
    assert torch.equal(caches[1, 1].flatten(0, 1)[slots], step.value)
    assert caches.isnan().sum() == caches.numel() - step.key.numel() - step.value.numel()


def test_store_beyond_2_31_elements():
    """D52: int8, so that 2 GiB hold that many slots; memory that is not touched takes no room."""
    slot = 2**31 + 5
    cache = torch.empty(2**23 + 1, 256, 1, 1, dtype=torch.int8)
    cache.view(-1)[[5, slot]] = 1
    token = torch.full((1, 1, 1), 7, dtype=torch.int8)
    TorchAttentionBackend().store(token, token, cache, cache, torch.tensor([slot]))
    assert cache.view(-1)[[5, slot]].tolist() == [1, 7]


def test_slots_beyond_2_31():
    """D52: block tables are int32, their slots are not."""
    slots = torch_attention._slots(torch.tensor([2**30], dtype=torch.int32), torch.tensor([3]), 256)
    assert slots.tolist() == [2**38 + 3]


def test_without_a_cache_prefill_attends_over_the_step_and_stores_nothing():
    """Warm-up runs before there is a cache."""
    step = make_step(STEPS["prefill"])
    layer = Attention(4, 16, 0.25, 2, TorchAttentionBackend())
    with set_context(step.context):
        output = layer(step.query, step.key, step.value)
    cu_seqlens = step.context.cu_seqlens_q
    expected = varlen_attention(step.query, step.key, step.value, cu_seqlens, cu_seqlens)
    assert_close(ATTENTION, output, expected, rtol=0, atol=FLOAT64_TOLERANCE)


def test_without_a_cache_cached_keys_are_an_error():
    step = make_step(STEPS["decode"])
    layer = Attention(4, 16, 0.25, 2, TorchAttentionBackend())
    with set_context(step.context), pytest.raises(RuntimeError, match="bind_kv_cache"):
        layer(step.query, step.key, step.value)


def test_forward_passes_do_not_nest_and_a_failed_one_leaves_nothing_behind():
    context = make_step(STEPS["prefill"]).context
    with set_context(context), pytest.raises(RuntimeError, match=r"set_context\(\) is already active"):  # noqa: SIM117
        with set_context(context):
            pass
    with set_context(context):
        assert get_context() is context


def test_outside_a_forward_pass_is_an_error():
    step = make_step(STEPS["prefill"])
    layer = Attention(4, 16, 0.25, 2, TorchAttentionBackend())
    with pytest.raises(RuntimeError, match="set_context"):
        layer(step.query, step.key, step.value)


@each_step
def test_heads_may_come_flattened(case):
    expected = make_step(case).run(TorchAttentionBackend())
    step = make_step(case)
    flat = dataclasses.replace(step, query=step.query.flatten(1), key=step.key.flatten(1), value=step.value.flatten(1))
    assert_same_bits(flat.run(TorchAttentionBackend()), expected)


@pytest.mark.parametrize("case", [Case(((8, 8),)), Case(((3, 8),)), Case(((1, 8),), is_prefill=False)], ids=str)
def test_scale_is_applied(case):
    """1, since torch's own default, 1 / 4 here, is the scale that the other tests use."""
    step = make_step(case)
    k_cache, v_cache = step.expected_caches()
    lens, cu_seqlens_q = step.context.context_lens, step.context.cu_seqlens_q
    expected = paged_attention(step.query, k_cache, v_cache, step.block_tables, lens, cu_seqlens_q, 1.0)
    layer = Attention(4, 16, 1.0, 2, TorchAttentionBackend())
    layer.bind_kv_cache(step.k_cache, step.v_cache)
    with set_context(step.context):
        output = layer(step.query, step.key, step.value)
    assert_close(ATTENTION, output, expected, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_step
def test_on_a_gpu(case, dtype):
    step = make_step(dataclasses.replace(case, head_dim=64), dtype, "cuda")
    caches = step.expected_caches()
    expected = step.expected_output()
    assert_within_twice_the_error_of_plain_torch("torch backend", step, step.run(TorchAttentionBackend()), expected)
    assert_same_bits(step.k_cache, caches[0])
    assert_same_bits(step.v_cache, caches[1])
