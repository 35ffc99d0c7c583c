"""Cases of store_kvcache for a device: see tests/support/kernels/interpreting.py. Kernels are imported late, for triton."""

from dataclasses import dataclass
from functools import partial

import torch

from reference.store_kvcache import store_kvcache as reference_store_kvcache
from tests.attention_cases import assert_same_bits
from tests.support.kernels.accuracy import counted
from tests.support.kernels.interpreting import Guards


@dataclass(frozen=True)
class Case:
    num_kv_heads: int
    head_dim: int
    slots: tuple[int, ...] = (7, -1, 0, 39, 16, -1, 15)
    num_blocks: int = 3
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    slot_dtype: torch.dtype = torch.int64
    tile_size: int = 1024


CASES = {
    "one element": Case(1, 1),
    "power of two": Case(2, 32),
    "3 x 64": Case(3, 64),  # D51: rows that are no power of two
    "5 x 64": Case(5, 64),
    "10 x 128": Case(10, 128),
    "1 x 80, odd head size": Case(1, 80),
    "row of several tiles": Case(3, 64, tile_size=64),
    "last tile is partial": Case(5, 24, tile_size=32),
    "several tokens a tile": Case(1, 16, tile_size=64),
    "block size 1": Case(3, 16, num_blocks=48, block_size=1),
    "block size 256": Case(2, 16, slots=(767, 0, 256, -1, 255), block_size=256),
    "float16": Case(3, 64, dtype=torch.float16),
    "bfloat16": Case(3, 64, dtype=torch.bfloat16),  # moved, not computed with, so right in the interpreter too
    "int32 slots": Case(2, 32, slot_dtype=torch.int32),
    "nothing to store": Case(2, 32, slots=(-1, -1)),
    "no tokens": Case(2, 32, slots=()),
    "every slot": Case(2, 8, slots=tuple(reversed(range(48)))),
}


def check_case(case: Case, device: str) -> None:
    """The caches are, bit for bit, what reference.store_kvcache gives."""
    from nanovllm.kernels.store_kvcache import store_kvcache

    guards = Guards(device)
    num_tokens, heads, dim = len(case.slots), case.num_kv_heads, case.head_dim
    # Key and value are views of a packed qkv of 2 query heads, so that a token's stride exceeds its row.
    qkv = torch.randn(num_tokens, 2 + 2 * heads, dim, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    _, key, value = guards.read(qkv).split([2, heads, heads], dim=1)
    slot_mapping = guards.read(torch.tensor(case.slots, dtype=case.slot_dtype))
    shape = (case.num_blocks, case.block_size, heads, dim)
    k_cache, v_cache = guards.unwritten(*shape, dtype=case.dtype), guards.unwritten(*shape, dtype=case.dtype)
    expected = reference_store_kvcache(key, value, k_cache, v_cache, slot_mapping)
    with guards:
        store_kvcache(key, value, k_cache, v_cache, slot_mapping, tile_size=case.tile_size)
    guards.assert_intact()
    assert_same_bits(k_cache, expected[0])
    assert_same_bits(v_cache, expected[1])
    counted("store_kvcache", torch.stack([k_cache, v_cache]))


def check_strides(device: str) -> None:
    """Heads stand further apart than head_dim: every other head of a wider tensor."""
    from nanovllm.kernels.store_kvcache import store_kvcache

    guards = Guards(device)
    wide = guards.read(torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)))
    key, value = wide[:, ::2], wide[:, 1::2]
    slot_mapping = guards.read(torch.tensor([3, -1, 1]))
    caches = [guards.unwritten(2, 2, 4, 16, dtype=torch.float32) for _ in range(2)]
    expected = reference_store_kvcache(key, value, caches[0], caches[1], slot_mapping)
    with guards:
        store_kvcache(key, value, caches[0], caches[1], slot_mapping)
    guards.assert_intact()
    for cache, expected_cache in zip(caches, expected, strict=True):
        assert_same_bits(cache, expected_cache)


def check_far_slot(device: str) -> None:
    """D52: a slot whose elements lie beyond 2**31, from an int32 mapping.

    int8 and one cache for both, so that it takes 2 GiB, of which a CPU touches two pages.
    """
    from nanovllm.kernels.store_kvcache import store_kvcache

    block_size, heads, dim = 256, 4, 64
    row = heads * dim
    num_slots = 2**31 // row + block_size
    slot = num_slots - 1
    cache = torch.empty(num_slots // block_size, block_size, heads, dim, dtype=torch.int8, device=device)
    rows = cache.view(num_slots, row)
    rows[slot] = 1
    token = torch.full((1, heads, dim), 7, dtype=torch.int8, device=device)
    store_kvcache(token, token, cache, cache, torch.tensor([slot], dtype=torch.int32, device=device))
    assert (rows[slot] == 7).all()


CHECKS = {name: partial(check_case, case) for name, case in CASES.items()}
CHECKS |= {"strides": check_strides, "far slot": check_far_slot}
