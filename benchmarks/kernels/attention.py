"""What is measured of attention: decode (paged_attention) and prefill (varlen_attention, varlen_attention_hopper)."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import MAX_MODEL_LEN, attend_one_by_one, cumulated, int32, paged_cache, randn
from benchmarks.measuring import Measured
from tests.support.kernels.registry import lazy

paged_attention = lazy("paged_attention.paged_attention")
varlen_attention = lazy("varlen_attention.varlen_attention")
choose_tile_config = lazy("varlen_attention.choose_tile_config")
flash_attention_decode = lazy("flash_attention.flash_attention_decode")
flash_attention_prefill = lazy("flash_attention.flash_attention_prefill")


def measured_decode(lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> Measured:
    scale = head_dim**-0.5

    def make(index: int) -> tuple[torch.Tensor, ...]:
        caches = paged_cache(index, lens, num_kv_heads, head_dim, block_size, MAX_MODEL_LEN // block_size)
        context_lens = int32(lens)
        order = context_lens.argsort(descending=True, stable=True).int()
        return randn(index, len(lens), num_heads, head_dim), *caches, context_lens, order

    def run(query, k_cache, v_cache, block_tables, context_lens, order):
        return paged_attention(query, k_cache, v_cache, block_tables, context_lens, scale, sequence_order=order)

    def plain(query, k_cache, v_cache, block_tables, context_lens, order, dtype=torch.bfloat16):
        return attend_one_by_one(query, k_cache, v_cache, block_tables, [1] * len(lens), lens, dtype)

    def flash(query, k_cache, v_cache, block_tables, context_lens, order):
        return flash_attention_decode(query, k_cache, v_cache, context_lens, block_tables, scale)

    # keys and values of every context read, B H D queries read, as many outputs written
    query_bytes = len(lens) * num_heads * head_dim * 2
    kv_bytes = sum(lens) * 2 * num_kv_heads * head_dim * 2
    return Measured(
        make=make,
        run=run,
        expected=partial(plain, dtype=torch.float32),
        work=Work(kv_bytes + query_bytes, query_bytes, 4 * num_heads * head_dim * sum(lens)),
        peers={"torch": plain} | ({"flash-attn": flash} if block_size % 256 == 0 else {}),
    )


def measured_prefill(
    query_lens: list[int],
    prefix: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    prefill: Callable[..., torch.Tensor] = varlen_attention,
) -> Measured:
    """prefill: the launcher, and by default the kernel that the engine would take."""
    key_lens = [prefix + length for length in query_lens]
    scale = head_dim**-0.5

    def make(index: int) -> tuple[torch.Tensor, ...]:
        qkv = randn(index, sum(query_lens), num_heads + 2 * num_kv_heads, head_dim)
        caches = paged_cache(index, key_lens, num_kv_heads, head_dim, block_size=256)
        return qkv[:, :num_heads], *caches, cumulated(query_lens), cumulated(key_lens)

    def run(query, k_cache, v_cache, block_tables, cu_seqlens_q, cu_seqlens_k):
        arguments = (query, k_cache, v_cache, cu_seqlens_q, cu_seqlens_k, scale)
        return prefill(*arguments, max_seqlen_q=max(query_lens), block_tables=block_tables)

    def plain(query, k_cache, v_cache, block_tables, cu_seqlens_q, cu_seqlens_k, dtype=torch.bfloat16):
        return attend_one_by_one(query, k_cache, v_cache, block_tables, query_lens, key_lens, dtype)

    def flash(query, k_cache, v_cache, block_tables, cu_seqlens_q, cu_seqlens_k):
        lens = (cu_seqlens_q, cu_seqlens_k, max(query_lens), max(key_lens))
        return flash_attention_prefill(query, k_cache, v_cache, *lens, scale, block_tables)

    return Measured(
        make=make,
        run=run,
        expected=partial(plain, dtype=torch.float32),
        work=work_of_prefill(query_lens, key_lens, num_heads, num_kv_heads, head_dim),
        peers={"torch": plain, "flash-attn": flash},
    )


def work_of_prefill(
    query_lens: list[int], key_lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int
) -> Work:
    """4 H D operations a causal pair; queries, keys and values read, outputs written."""
    query_bytes = sum(query_lens) * num_heads * head_dim * 2
    kv_bytes = sum(key_lens) * 2 * num_kv_heads * head_dim * 2
    num_operations = 4 * num_heads * head_dim * num_causal_pairs(query_lens, key_lens)
    return Work(query_bytes + kv_bytes, query_bytes, num_operations)


def num_causal_pairs(query_lens: list[int], key_lens: list[int]) -> int:
    """Pairs of a query and a key that it sees: query i of q sees k - q + i + 1 of k keys."""
    return sum(q * (k - q) + q * (q + 1) // 2 for q, k in zip(query_lens, key_lens, strict=True))


def portable(query: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
    """The kernel for every GPU, also where there is a special one."""
    tiles = choose_tile_config(query.dtype, query.shape[2], torch.cuda.get_device_capability())
    return varlen_attention(query, *arguments, tiles=tiles, **options)
