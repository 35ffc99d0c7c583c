"""Decode attention: one query a sequence over the paged cache."""

from functools import partial

import pytest
import torch

from benchmarks import arithmetic
from benchmarks.kernels.inputs import MAX_MODEL_LEN, attend_one_by_one, int32, paged_cache, randn
from benchmarks.shapes import NUM_SEQS, SHAPES, draw_lens

# PERFORMANCE.md's: name: (context lengths, H, K, block sizes), heads of 128
NAMED = {
    "256 x 100-1800": (draw_lens(256, 100, 1800), 16, 8, (16, 64, 256)),
    "64 x 500-4000": (draw_lens(64, 500, 4000), 32, 8, (256,)),
    "64 x 100-1800": (draw_lens(64, 100, 1800), 16, 8, (256,)),
    "1 x 16000": ([16000], 32, 8, (256,)),
    "8 x 1000": ([1000] * 8, 16, 8, (16, 256)),
    "16 x 1000": ([1000] * 16, 16, 8, (256,)),
    "1 x 400": ([400], 16, 8, (256,)),
}


def bench(
    measure, case: str, lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    from nanovllm.kernels.flash_attention import flash_attention_decode
    from nanovllm.kernels.paged_attention import paged_attention

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

    measure(
        "paged_attention",
        case,
        make=make,
        run=run,
        expected=partial(plain, dtype=torch.float32),
        work=arithmetic.paged_attention(lens, num_heads, num_kv_heads, head_dim),
        peers={"torch": plain} | ({"flash-attn": flash} if block_size % 256 == 0 else {}),
    )


@pytest.mark.parametrize(
    ("name", "block_size"), [(name, size) for name, (*_, sizes) in NAMED.items() for size in sizes]
)
def test_named_decodes(measure, name, block_size):
    lens, num_heads, num_kv_heads, _ = NAMED[name]
    bench(
        measure,
        f"{name}, {num_heads}/{num_kv_heads}, block {block_size}",
        lens,
        num_heads,
        num_kv_heads,
        128,
        block_size,
    )


@pytest.mark.parametrize("num_seqs", NUM_SEQS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "qwen3-0.6b"])  # the named ones have its heads
def test_decodes(measure, shape, num_seqs):
    heads = SHAPES[shape]
    lens = draw_lens(num_seqs, 100, 1800)
    bench(measure, f"{shape}, {num_seqs} seqs", lens, heads.num_heads, heads.num_kv_heads, heads.head_dim, 256)
