"""A step of another size compiles nothing: a variant takes a second, and a request would wait for it.

Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, and for an address that is a multiple of 16.
So a kernel must not look at integers that change from step to step: numbers of tokens, widths of block tables. What a
launcher chooses by size (tiles, warps) makes variants too, and those are stated here.
"""

from collections.abc import Callable

import pytest
import torch

from tests.evidence import compared
from tests.kernels.compiling import compile_launches

pytest.importorskip("triton")

SIZES = (1, 2, 3, 15, 16, 17, 48, 250, 256, 1000)


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
