"""Prefill attention over the paged cache, whole prompts and chunks behind a cached prefix."""

from functools import partial

import pytest
import torch

from benchmarks import arithmetic
from benchmarks.kernels.inputs import attend_one_by_one, cumulated, paged_cache, randn
from benchmarks.shapes import SHAPES

# PERFORMANCE.md's, and a chunk: name: (query lengths, cached tokens before each, H, K), heads of 128
NAMED = {
    "16 x 1024": ([1024] * 16, 0, 16, 8),
    "2 x 8192": ([8192] * 2, 0, 32, 8),
    "4 x 1024 after 4096": ([1024] * 4, 4096, 16, 8),
    "256 x 100 after 2000": ([100] * 256, 2000, 16, 8),
}
PROMPT_LENS = {1: 4096, 8: 1024, 64: 256, 256: 64}  # by the number of sequences


def best(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, **options):
    from nanovllm.kernels.varlen_attention import varlen_attention

    return varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, **options)


def portable(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, **options):
    """The kernel for every GPU, also where there is a special one."""
    from nanovllm.kernels.varlen_attention import choose_tiles, varlen_attention

    tiles = choose_tiles(query.dtype, query.shape[2], torch.cuda.get_device_capability())
    return varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, tiles=tiles, **options)


def hopper(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, **options):
    from nanovllm.kernels.varlen_attention_hopper import varlen_attention_hopper

    return varlen_attention_hopper(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, **options)


KERNELS = {"varlen_attention": portable, "varlen_attention_hopper": hopper, "prefill": best}


def bench(
    measure,
    kernel: str,
    case: str,
    query_lens: list[int],
    prefix: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    from nanovllm.kernels.flash_attention import flash_attention_prefill

    key_lens = [prefix + length for length in query_lens]
    scale = head_dim**-0.5

    def make(index: int) -> tuple[torch.Tensor, ...]:
        qkv = randn(index, sum(query_lens), num_heads + 2 * num_kv_heads, head_dim)
        caches = paged_cache(index, key_lens, num_kv_heads, head_dim, block_size=256)
        return qkv[:, :num_heads], *caches, cumulated(query_lens), cumulated(key_lens)

    def run(query, k_cache, v_cache, block_tables, cu_seqlens_q, cu_seqlens_k):
        return KERNELS[kernel](
            query,
            k_cache,
            v_cache,
            cu_seqlens_q,
            cu_seqlens_k,
            scale,
            max_seqlen_q=max(query_lens),
            block_tables=block_tables,
        )

    def plain(query, k_cache, v_cache, block_tables, cu_seqlens_q, cu_seqlens_k, dtype=torch.bfloat16):
        return attend_one_by_one(query, k_cache, v_cache, block_tables, query_lens, key_lens, dtype)

    def flash(query, k_cache, v_cache, block_tables, cu_seqlens_q, cu_seqlens_k):
        return flash_attention_prefill(
            query,
            k_cache,
            v_cache,
            cu_seqlens_q,
            cu_seqlens_k,
            max(query_lens),
            max(key_lens),
            scale,
            block_tables,
        )

    measure(
        kernel,
        case,
        make=make,
        run=run,
        expected=partial(plain, dtype=torch.float32),
        work=arithmetic.varlen_attention(query_lens, key_lens, num_heads, num_kv_heads, head_dim),
        peers={"torch": plain, "flash-attn": flash},
    )


@pytest.mark.parametrize("kernel", ["varlen_attention", "varlen_attention_hopper"])
@pytest.mark.parametrize("name", NAMED)
def test_named_prefills(measure, name, kernel):
    if kernel == "varlen_attention_hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    query_lens, prefix, num_heads, num_kv_heads = NAMED[name]
    bench(measure, kernel, f"{name}, {num_heads}/{num_kv_heads}", query_lens, prefix, num_heads, num_kv_heads, 128)


@pytest.mark.parametrize("num_seqs", PROMPT_LENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefills(measure, shape, num_seqs):
    """With the kernel that the engine would take."""
    heads, length = SHAPES[shape], PROMPT_LENS[num_seqs]
    case = f"{shape}, {num_seqs} x {length}"
    bench(measure, "prefill", case, [length] * num_seqs, 0, heads.num_heads, heads.num_kv_heads, heads.head_dim)
