"""A step of another size compiles nothing: a variant takes a second, and a request would wait for it.

Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, and for an address that is a multiple of 16.
So a kernel must not look at integers that change from step to step: numbers of tokens, widths of block tables. What a
launcher chooses by size (tiles, warps) makes variants too, and those are stated here.
"""

from collections.abc import Callable

import pytest
import torch

from nanovllm.engine.model_input import prepare_kinds_of_prefill
from tests.evidence import compared
from tests.support.kernels.compiling import compile_launches

pytest.importorskip("triton")

SIZES = (1, 2, 3, 15, 16, 17, 48, 250, 256, 1000)


# Numbers of tokens: those of start-up's prefills, and others, which any step may have.
MET_AT_START = tuple({len(kind.input_ids) for kind in prepare_kinds_of_prefill(16384, 4096, 512, 100, 256)})
ANY = (3, 5, 7, 9, 15, 17, 31, 100, 140, 240, 255, 257, 700, 960, 1023, 1025, 3000, 4095, 4097, 12345, 16383)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norm(size: int) -> None:
    from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm

    rms_norm(meta(size, 1024), meta(1024), 1e-6)
    add_rms_norm(meta(size, 1024), meta(size, 1024), meta(1024), 1e-6)


def silu_and_mul(size: int) -> None:
    from nanovllm.kernels.silu_and_mul import silu_and_mul

    silu_and_mul(meta(size, 6144))


def rotary_embedding(size: int) -> None:
    from nanovllm.kernels.rotary_embedding import rotary_embedding

    query, key, _ = meta(size, 4096).view(size, 32, 128).split([16, 8, 8], dim=1)
    rotary_embedding(query, key, meta(size, 64, dtype=torch.float32), meta(size, 64, dtype=torch.float32))


def qk_norm_rope_store(size: int) -> None:
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store

    tables = meta(size, 64, dtype=torch.float32), meta(size, 64, dtype=torch.float32)
    caches = meta(100, 256, 8, 128), meta(100, 256, 8, 128)
    slots = meta(size, dtype=torch.int64)
    qk_norm_rope_store(meta(size, 4096), *tables, meta(128), meta(128), 1e-6, 16, *caches, slots, num_kv_heads=8)


def qk_norm_rope_store_of_a_prefill(size: int) -> None:
    """Nothing is cached yet: attention takes the keys from here."""
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store

    tables = meta(size, 64, dtype=torch.float32), meta(size, 64, dtype=torch.float32)
    caches = meta(100, 256, 8, 128), meta(100, 256, 8, 128)
    arguments = meta(size, 4096), *tables, meta(128), meta(128), 1e-6, 16, *caches, meta(size, dtype=torch.int64)
    qk_norm_rope_store(*arguments, num_kv_heads=8, returns_key=True)


def store_kvcache(size: int) -> None:
    from nanovllm.kernels.store_kvcache import store_kvcache

    _, key, value = meta(size, 4096).view(size, 32, 128).split([16, 8, 8], dim=1)
    store_kvcache(key, value, meta(100, 256, 8, 128), meta(100, 256, 8, 128), meta(size, dtype=torch.int64))


def sampling(size: int) -> None:
    from nanovllm.kernels.sampling import sampling

    _, *integers = meta(4, size, dtype=torch.int64)  # as the engine has them: rows of one tensor
    _, temperature = meta(2, size, dtype=torch.float32)
    sampling(meta(size, 151936), temperature, *integers, meta(size, dtype=torch.bool))


def paged_attention(size: int) -> None:
    """Not split: splitting is chosen by the number of sequences."""
    from nanovllm.kernels.paged_attention import paged_attention

    tables, lens = meta(64, size, dtype=torch.int32), meta(64, dtype=torch.int32)
    paged_attention(meta(64, 16, 128), *(meta(100, 256, 8, 128) for _ in range(2)), tables, lens, num_splits=1)


def split_paged_attention(size: int) -> None:
    from nanovllm.kernels.paged_attention import paged_attention

    tables, lens = meta(1, size, dtype=torch.int32), meta(1, dtype=torch.int32)
    caches = meta(100, 256, 8, 128), meta(100, 256, 8, 128)
    paged_attention(meta(1, 16, 128), *caches, tables, lens, num_splits=min(17, 1 + size))


def varlen_attention(size: int) -> None:
    from nanovllm.kernels.varlen_attention import Tiles, varlen_attention

    tables, cu_seqlens = meta(2, size, dtype=torch.int32), meta(3, dtype=torch.int32)
    arguments = meta(size, 16, 128), meta(100, 256, 8, 128), meta(100, 256, 8, 128), cu_seqlens, cu_seqlens
    varlen_attention(*arguments, max_seqlen_q=size, block_tables=tables, tiles=Tiles(64, 64, 4, 3))


def moe_routing(size: int) -> None:
    from nanovllm.kernels.moe_routing import moe_routing

    moe_routing(meta(size, 128), 8, True, 16)


def mixture_of_experts(size: int) -> None:
    """As SparseMoeBlock has it, with Qwen3-30B-A3B's experts."""
    from nanovllm.kernels.grouped_gemm import grouped_gemm, grouped_gemm_tiles
    from nanovllm.kernels.moe_routing import moe_routing

    tiles = grouped_gemm_tiles(size * 8, 128, 2)
    routing = moe_routing(meta(size, 128), 8, True, tiles.rows)
    grouped_gemm(meta(size, 2048), meta(128, 2 * 768, 2048), meta(128, 2048, 768), routing, tiles=tiles)


# Each launcher at one size, and how many variants of its kernels all sizes may take.
LAUNCHES: dict[str, tuple[Callable[[int], None], int]] = {
    "rms_norm": (rms_norm, 2),  # with a residual and without
    "silu_and_mul": (silu_and_mul, 1),
    "rotary_embedding": (rotary_embedding, 1),
    "qk_norm_rope_store": (qk_norm_rope_store, 2),  # few tokens and many
    "store_kvcache": (store_kvcache, 1),
    "sampling": (sampling, 2),  # a tile's part and a row's
    "paged_attention": (paged_attention, 1),
    "paged_attention, split": (split_paged_attention, 6),  # splits combined at once: 2, 4, 8, 16, 32; and attention
    "varlen_attention": (varlen_attention, 1),
    "moe_routing": (moe_routing, 12),  # tiles of 1, 2, 4 and 16 tokens; eight sizes of a chunk
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_another_size_compiles_nothing_new(name: str) -> None:
    launch, most = LAUNCHES[name]
    variants = {(one.name, one.variant) for one in compile_launches(lambda: [launch(size) for size in SIZES])}
    assert len(variants) <= most, sorted(kernel for kernel, _ in variants)
    compared("kernels: variants of a step's sizes", len(SIZES))


def mixture_of_60_experts(size: int) -> None:
    """Four a token: no limit is at a power of two."""
    from nanovllm.kernels.grouped_gemm import grouped_gemm_tiles
    from nanovllm.kernels.moe_routing import moe_routing

    moe_routing(meta(size, 60), 4, True, grouped_gemm_tiles(size * 4, 60, 2).rows)


@pytest.mark.parametrize(
    "launch",
    [
        rms_norm,
        silu_and_mul,
        rotary_embedding,
        qk_norm_rope_store,
        qk_norm_rope_store_of_a_prefill,
        store_kvcache,
        mixture_of_experts,
        mixture_of_60_experts,
    ],
)
def test_start_up_meets_every_variant_that_a_number_of_tokens_asks_for(launch: Callable[[int], None]) -> None:
    compiled = compile_launches(lambda: [launch(size) for size in (*MET_AT_START, *ANY)])
    variants = [(one.name, one.variant) for one in compiled]
    num_met = len(MET_AT_START) * (len(variants) // len(MET_AT_START + ANY))  # each launch launches as many kernels
    assert set(variants[num_met:]) <= set(variants[:num_met])
    compared("kernels: variants of a step's sizes", len(ANY))
