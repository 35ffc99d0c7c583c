"""The references of attention and of the KV cache against loops, torch and laws.

Everything runs in float64. Two orders of summing n terms of size 1 differ by at most about n * 2**-53; with n below 100
and a softmax in between, 1e-12 is a safe bound and ten orders of magnitude below any mistake.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.attention import attention
from reference.packing import packing, unpacking, varlen_attention
from reference.paged_attention import paged_attention
from reference.shared_prefix_attention import shared_prefix_attention
from reference.slot_mapping import slot_mapping
from reference.store_kvcache import store_kvcache
from tests.support.comparing import assert_close

TOLERANCE = 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close("reference: attention against loops, PyTorch and laws", actual, expected, rtol=0, atol=TOLERANCE)


# q_len, k_len, H, K, D: one token; whole prompt; a chunk after a prefix; decode; GQA 1, 2, 4 and multi-query
SHAPES = [(1, 1, 1, 1, 1), (5, 5, 2, 2, 4), (3, 8, 4, 2, 4), (1, 9, 8, 2, 6), (4, 6, 4, 1, 3)]


@pytest.mark.parametrize(("q_len", "k_len", "num_heads", "num_kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_equals_torch(q_len, k_len, num_heads, num_kv_heads, head_dim, scale) -> None:
    query = random(q_len, num_heads, head_dim, seed=1)
    key, value = (random(k_len, num_kv_heads, head_dim, seed=seed) for seed in (2, 3))
    mask = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    close(attention(query, key, value, scale), expected[0].transpose(0, 1))


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_unpacking_inverts_packing(lengths: list[int]) -> None:
    sequences = [torch.arange(n) + 100 * b for b, n in enumerate(lengths)]
    packed, cu_seqlens = packing(sequences)
    assert packed.tolist() == [token for sequence in sequences for token in sequence.tolist()]
    assert (cu_seqlens[1:] - cu_seqlens[:-1]).tolist() == lengths
    assert cu_seqlens.dtype == torch.int32
    assert [s.tolist() for s in unpacking(packed, cu_seqlens)] == [s.tolist() for s in sequences]


def test_varlen_attention_equals_one_masked_attention_over_the_whole_pack() -> None:
    """The pack as one text in which a query sees a key if both are of one sequence and the key is not later."""
    q_lens, k_lens = [3, 1, 2], [3, 4, 6]
    query, key, value = random(6, 4, 4, seed=1), random(13, 2, 4, seed=2), random(13, 2, 4, seed=3)
    q_seq, k_seq = (torch.arange(3).repeat_interleave(torch.tensor(lens)) for lens in (q_lens, k_lens))
    q_pos = torch.cat([torch.arange(k - q, k) for q, k in zip(q_lens, k_lens, strict=True)])
    k_pos = torch.cat([torch.arange(k) for k in k_lens])
    mask = (q_seq[:, None] == k_seq) & (q_pos[:, None] >= k_pos)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 3, 4, 6]), torch.tensor([0, 3, 7, 13])
    close(varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k), expected)


@given(block_size=st.integers(1, 7), num_tokens=st.integers(1, 40), data=st.data())
def test_slots_are_the_blocks_laid_end_to_end(block_size: int, num_tokens: int, data: st.DataObject) -> None:
    """D01: the last of n tokens has position n - 1, so its slot is the n-th of the table's slots."""
    num_blocks = -(-num_tokens // block_size)
    block_table = data.draw(st.permutations(range(num_blocks + 3)))[:num_blocks]
    all_slots = [slot for block in block_table for slot in range(block * block_size, (block + 1) * block_size)]
    slots = slot_mapping(torch.arange(num_tokens), torch.tensor(block_table), block_size).tolist()
    assert slots == all_slots[:num_tokens]


def test_store_equals_an_index_copy_into_the_flat_cache() -> None:
    key, value = random(4, 3, 5, seed=1), random(4, 3, 5, seed=2)
    k_cache, v_cache = random(6, 4, 3, 5, seed=3), random(6, 4, 3, 5, seed=4)
    slots, real = torch.tensor([9, -1, 0, 22]), [0, 2, 3]  # 23, which Python might call -1, stays
    expected_k = k_cache.flatten(0, 1).index_copy(0, slots[real], key[real]).view_as(k_cache)
    expected_v = v_cache.flatten(0, 1).index_copy(0, slots[real], value[real]).view_as(v_cache)
    stored_k, stored_v = store_kvcache(key, value, k_cache, v_cache, slots)
    assert torch.equal(stored_k, expected_k)
    assert torch.equal(stored_v, expected_v)


@given(
    block_size=st.integers(1, 5),
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@settings(max_examples=40)
def test_paged_attention_does_not_depend_on_where_the_blocks_are(block_size, lengths, seed, data) -> None:
    """Store the keys of each sequence in blocks drawn at random, in a pool full of NaN: the result is that of keys in a
    row. D53: what no sequence owns is never read, or it would be NaN. Lengths are (queries, cached before)."""
    q_lens = [q for q, _ in lengths]
    k_lens = [q + cached for q, cached in lengths]
    keys = [random(n, 2, 4, seed=seed + b) for b, n in enumerate(k_lens)]
    values = [random(n, 2, 4, seed=seed + 50 + b) for b, n in enumerate(k_lens)]
    queries = [random(n, 4, 4, seed=seed + 90 + b) for b, n in enumerate(q_lens)]
    blocks_of = [-(-n // block_size) for n in k_lens]
    num_blocks, width = sum(blocks_of) + 2, max(blocks_of) + 1
    order = list(data.draw(st.permutations(range(num_blocks))))
    tables = torch.full((len(lengths), width), -1)
    for b, n in enumerate(blocks_of):
        tables[b, :n] = torch.tensor([order.pop() for _ in range(n)])

    k_cache = v_cache = torch.full((num_blocks, block_size, 2, 4), torch.nan, dtype=torch.float64)
    for b, n in enumerate(k_lens):
        slots = slot_mapping(torch.arange(n), tables[b], block_size)
        k_cache, v_cache = store_kvcache(keys[b], values[b], k_cache, v_cache, slots)

    expected = torch.cat([attention(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)])
    query, cu_seqlens_q = packing(queries)
    close(paged_attention(query, k_cache, v_cache, tables, torch.tensor(k_lens), cu_seqlens_q), expected)


@pytest.mark.parametrize("shared_lens", [[0, 0], [4, 4], [1, 3], [6, 5]], ids=str)
def test_a_shared_prefix_changes_nothing(shared_lens: list[int]) -> None:
    """Attention over two parts of the keys, merged, is attention over all: also where a part has no keys."""
    k_cache, v_cache, query = random(4, 2, 2, 4, seed=1), random(4, 2, 2, 4, seed=2), random(2, 4, 4, seed=3)
    tables, context_lens = torch.tensor([[3, 1, 0], [3, 1, 2]]), torch.tensor([6, 5])
    expected = paged_attention(query, k_cache, v_cache, tables, context_lens)
    close(shared_prefix_attention(query, k_cache, v_cache, tables, context_lens, torch.tensor(shared_lens)), expected)
