"""Cases of store_kvcache for a device. Run as a module, it checks them in Triton's interpreter on the CPU.

The interpreter is chosen before triton's first import, once a process, and an access out of bounds kills it: hence a
process of its own, and guard margins around every buffer. The kernel is imported late, for machines without triton.
"""

import sys
from dataclasses import dataclass

import torch

from reference.store_kvcache import store_kvcache as reference_store_kvcache
from tests.attention_cases import assert_same_bits

MARGIN = 4096


@dataclass(frozen=True)
class Case:
    num_kv_heads: int
    head_dim: int
    slots: tuple[int, ...] = (7, -1, 0, 39, 16, -1, 15)
    num_blocks: int = 3
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    slot_dtype: torch.dtype = torch.int64
    max_tile_size: int = 2048


CASES = {
    "one element": Case(1, 1),
    "power of two": Case(2, 32),
    "3 x 64": Case(3, 64),  # D51: rows that are no power of two
    "5 x 64": Case(5, 64),
    "10 x 128": Case(10, 128),
    "1 x 80, odd head size": Case(1, 80),
    "row of several tiles": Case(3, 64, max_tile_size=64),
    "last tile is partial": Case(5, 24, max_tile_size=32),
    "block size 1": Case(3, 16, num_blocks=48, block_size=1),
    "block size 256": Case(2, 16, slots=(767, 0, 256, -1, 255), block_size=256),
    "float16": Case(3, 64, dtype=torch.float16),
    "bfloat16": Case(3, 64, dtype=torch.bfloat16),  # moved, not computed with, so right in the interpreter too
    "int32 slots": Case(2, 32, slot_dtype=torch.int32),
    "nothing to store": Case(2, 32, slots=(-1, -1)),
    "no tokens": Case(2, 32, slots=()),
    "every slot": Case(2, 8, slots=tuple(reversed(range(48)))),
}


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, view of `shape` inside it); all NaN, the margins before and after the view included."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * MARGIN,), torch.nan, dtype=dtype, device=device)
    return buffer, buffer[MARGIN : MARGIN + size].view(shape)


def check(case: Case, device: str) -> None:
    """Raise AssertionError unless the caches and their margins are, bit for bit, what reference.store_kvcache gives."""
    from nanovllm.kernels.store_kvcache import store_kvcache

    num_tokens, heads, dim = len(case.slots), case.num_kv_heads, case.head_dim
    # Key and value are views of a packed qkv of 2 query heads, so that a token's stride exceeds its row.
    _, qkv = guarded((num_tokens, 2 + 2 * heads, dim), case.dtype, device)
    qkv.copy_(torch.randn(qkv.shape, generator=torch.Generator().manual_seed(0)))
    _, key, value = qkv.split([2, heads, heads], dim=1)
    slot_mapping = torch.tensor(case.slots, dtype=case.slot_dtype, device=device)
    shape = (case.num_blocks, case.block_size, heads, dim)
    k_buffer, k_cache = guarded(shape, case.dtype, device)
    v_buffer, v_cache = guarded(shape, case.dtype, device)
    expected = reference_store_kvcache(key, value, k_cache, v_cache, slot_mapping)
    store_kvcache(key, value, k_cache, v_cache, slot_mapping, case.max_tile_size)
    for buffer, expected_cache in zip((k_buffer, v_buffer), expected, strict=True):
        expected_buffer = torch.full_like(buffer, torch.nan)
        expected_buffer[MARGIN:-MARGIN] = expected_cache.flatten()
        assert_same_bits(buffer, expected_buffer)


def check_strides(device: str) -> None:
    """Heads stand further apart than head_dim: every other head of a wider tensor."""
    from nanovllm.kernels.store_kvcache import store_kvcache

    wide = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)).to(device)
    key, value = wide[:, ::2], wide[:, 1::2]
    slot_mapping = torch.tensor([3, -1, 1], device=device)
    caches = [torch.full((2, 2, 4, 16), torch.nan, device=device) for _ in range(2)]
    expected = reference_store_kvcache(key, value, caches[0], caches[1], slot_mapping)
    store_kvcache(key, value, caches[0], caches[1], slot_mapping)
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


def main() -> None:
    for name, case in CASES.items():
        print(name, flush=True)
        check(case, "cpu")
    print("strides", flush=True)
    check_strides("cpu")
    print("far slot", flush=True)
    check_far_slot("cpu")
    print("done")


if __name__ == "__main__":
    sys.exit(main())
