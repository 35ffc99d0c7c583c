"""Cases of store_kvcache against reference.store_kvcache, to the bit. D51, D52"""

from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from reference.store_kvcache import store_kvcache as reference_store_kvcache
from tests.support.kernels.accuracy import assert_same_bits
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

store_kvcache = lazy("store_kvcache.store_kvcache")
CACHE_AXES = ("block", "slot", "head", "dimension")


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
    guards = Guards(device)
    num_tokens, heads, dim = len(case.slots), case.num_kv_heads, case.head_dim
    # Key and value are views of a packed qkv of 2 query heads, so that a token's stride exceeds its row.
    qkv = torch.randn(num_tokens, 2 + 2 * heads, dim, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    _, key, value = guards.read(qkv).split([2, heads, heads], dim=1)
    slot_mapping = guards.read(torch.tensor(case.slots, dtype=case.slot_dtype))
    shape = (case.num_blocks, case.block_size, heads, dim)
    caches = [guards.unwritten(*shape, dtype=case.dtype) for _ in range(2)]
    expected = reference_store_kvcache(key, value, *caches, slot_mapping)
    with guards:
        store_kvcache(key, value, *caches, slot_mapping, tile_size=case.tile_size)
    guards.assert_intact()
    for cache, expected_cache in zip(caches, expected, strict=True):
        assert_same_bits("store_kvcache", cache, expected_cache, CACHE_AXES)


def check_strides(device: str) -> None:
    """Heads stand further apart than head_dim: every other head of a wider tensor."""
    guards = Guards(device)
    wide = guards.read(torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)))
    key, value = wide[:, ::2], wide[:, 1::2]
    slot_mapping = guards.read(torch.tensor([3, -1, 1]))
    caches = [guards.unwritten(2, 2, 4, 16, dtype=torch.float32) for _ in range(2)]
    expected = reference_store_kvcache(key, value, *caches, slot_mapping)
    with guards:
        store_kvcache(key, value, *caches, slot_mapping)
    guards.assert_intact()
    for cache, expected_cache in zip(caches, expected, strict=True):
        assert_same_bits("store_kvcache", cache, expected_cache, CACHE_AXES)


def check_far_slot(device: str) -> None:
    """D52: a slot whose elements lie beyond 2**31, from an int32 mapping.

    int8 and one cache for both, so that it takes 2 GiB, of which a CPU touches two pages.
    """
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


def launch(num_tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    _, key, value = (
        meta(num_tokens, 4 * heads * dim, dtype=dtype)
        .view(num_tokens, 4 * heads, dim)
        .split([2 * heads, heads, heads], dim=1)
    )
    cache = meta(100, 256, heads, dim, dtype=dtype)
    store_kvcache(key, value, cache, cache, meta(num_tokens, dtype=torch.int64))


def meta_inputs() -> dict[str, torch.Tensor]:
    shapes = {"key": (3, 2, 16), "value": (3, 2, 16), "k_cache": (2, 16, 2, 16), "v_cache": (2, 16, 2, 16)}
    return {name: meta(*shape) for name, shape in shapes.items()} | {"slot_mapping": meta(3, dtype=torch.int64)}


def measured(shape: Shape, num_tokens: int) -> Measured:
    num_heads, num_kv_heads, head_dim = shape[:3]
    block_size = 256
    num_blocks = 1 + num_tokens // block_size
    num_bytes = 2 * num_tokens * num_kv_heads * head_dim * 2

    def make(index: int) -> tuple[torch.Tensor, ...]:
        qkv = randn(index, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        _, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        k_cache, v_cache = randn(index, 2, num_blocks, block_size, num_kv_heads, head_dim)
        generator = torch.Generator().manual_seed(index)
        if num_tokens > 256:  # prefill: whole blocks, which lie anywhere
            blocks = torch.randperm(num_blocks, generator=generator)[: num_tokens // block_size]
            slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        else:  # decode: one slot here, one there
            slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
        return key, value, k_cache, v_cache, slots.cuda()

    def run(key, value, k_cache, v_cache, slot_mapping):
        store_kvcache(key, value, k_cache, v_cache, slot_mapping)
        return k_cache, v_cache

    def plain(key, value, k_cache, v_cache, slot_mapping):
        k_cache.flatten(0, 1)[slot_mapping] = key
        v_cache.flatten(0, 1)[slot_mapping] = value
        return k_cache, v_cache

    return Measured(
        make=make,
        run=run,
        expected=lambda key, value, k, v, slots: plain(key, value, k.clone(), v.clone(), slots),
        work=Work(num_bytes, num_bytes),  # keys and values, read and written
        peers={"torch": plain},
        tolerance=0.0,
    )


KERNEL = Kernel(
    name="store_kvcache",
    # each element is read and written by one thread
    launched={"store_kvcache_kernel": Limits(max_registers=64, max_shared_bytes=0)},
    cases={name: partial(check_case, case) for name, case in CASES.items()}
    | {"strides": check_strides, "far slot": check_far_slot},
    drawn=st.builds(
        lambda *shape: partial(check_case, Case(*shape)),
        st.integers(1, 12),
        st.sampled_from([1, 24, 64, 80, 128, 256]),
        st.lists(st.integers(0, 47), unique=True, max_size=48).map(tuple),
        st.just(3),
        st.just(16),
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    ),
    compiled={
        f"{heads} x {dim}": Compilation(lambda dtype, _, heads=heads, dim=dim: launch(9, heads, dim, dtype))
        for heads, dim in [(8, 128), (4, 128), (2, 64), (3, 80), (8, 256)]
    },
    refused=Refusals(
        store_kvcache,
        meta_inputs,
        (
            ({"value": meta(3, 2, 32)}, "key and value must be"),
            ({"k_cache": meta(2, 16, 2, 32)}, "k_cache and v_cache must be"),
            ({"k_cache": meta(2, 16, 4, 16), "v_cache": meta(2, 16, 4, 16)}, "k_cache and v_cache must be"),
            ({"slot_mapping": meta(2, dtype=torch.int64)}, "one slot a token"),
        ),
    ),
    steps={"": Steps(lambda size: launch(size, 8, 128, torch.bfloat16), met_at_start=True)},
    measured={"store_kvcache": measured},
    reached_by="flash_attn",
)
