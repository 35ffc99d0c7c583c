"""Cases of store_kvcache against reference.store_kvcache, to the bit. D51, D52"""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from benchmarks.kernels.store_kvcache import measured
from reference.store_kvcache import store_kvcache as reference_store_kvcache
from tests.support.kernels.accuracy import assert_same_bits
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, lazy, meta

store_kvcache = lazy("store_kvcache.store_kvcache")
CACHE_AXES = ("block", "slot", "head", "dimension")


@case
def check_slots(
    device: str,
    num_kv_heads: int,
    head_dim: int,
    slots: Sequence[int] = (7, -1, 0, 39, 16, -1, 15),
    num_blocks: int = 3,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    slot_dtype: torch.dtype = torch.int64,
    tile_size: int = 1024,
    is_spread: bool = False,
) -> None:
    """The caches are, bit for bit, what reference.store_kvcache gives.

    Key and value are views of a packed qkv of 2 query heads, so that a token's stride exceeds its row. is_spread: every
    other head of a wider tensor, so that heads stand further apart than head_dim.
    """
    guards = Guards(device)
    if is_spread:
        wide = guards.randn(len(slots), 2 * num_kv_heads, head_dim, dtype=dtype)
        key, value = wide[:, ::2], wide[:, 1::2]
    else:
        qkv = guards.randn(len(slots), 2 + 2 * num_kv_heads, head_dim, dtype=dtype)
        _, key, value = qkv.split([2, num_kv_heads, num_kv_heads], dim=1)
    slot_mapping = guards.read(torch.tensor(slots, dtype=slot_dtype))
    caches = [guards.unwritten(num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype) for _ in "kv"]
    expected = reference_store_kvcache(key, value, *caches, slot_mapping)
    with guards:
        store_kvcache(key, value, *caches, slot_mapping, tile_size=tile_size)
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


CASES = {
    "one element": check_slots(1, 1),
    "3 x 64": check_slots(3, 64),  # D51: rows that are no power of two
    "1 x 80, odd head size": check_slots(1, 80),
    "last tile is partial": check_slots(5, 24, tile_size=32),
    "several tokens a tile": check_slots(1, 16, tile_size=64),
    "block size 1": check_slots(3, 16, num_blocks=48, block_size=1),
    "block size 256": check_slots(2, 16, slots=(767, 0, 256, -1, 255), block_size=256),
    "float16": check_slots(3, 64, dtype=torch.float16),
    "bfloat16": check_slots(3, 64, dtype=torch.bfloat16),  # moved, not computed with, so right in the interpreter too
    "int32 slots": check_slots(2, 32, slot_dtype=torch.int32),
    "nothing to store": check_slots(2, 32, slots=(-1, -1)),
    "no tokens": check_slots(2, 32, slots=()),
    "every slot": check_slots(2, 8, slots=tuple(reversed(range(48)))),
    "heads apart": check_slots(4, 16, is_spread=True),
    "far slot": check_far_slot,
}


def launch(num_tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    _, key, value = meta(num_tokens, 4 * heads, dim, dtype=dtype).split([2 * heads, heads, heads], dim=1)
    cache = meta(100, 256, heads, dim, dtype=dtype)
    store_kvcache(key, value, cache, cache, meta(num_tokens, dtype=torch.int64))


def meta_inputs() -> dict[str, torch.Tensor]:
    shapes = {"key": (3, 2, 16), "value": (3, 2, 16), "k_cache": (2, 16, 2, 16), "v_cache": (2, 16, 2, 16)}
    return {name: meta(*shape) for name, shape in shapes.items()} | {"slot_mapping": meta(3, dtype=torch.int64)}


KERNEL = Kernel(
    name="store_kvcache",
    # each element is read and written by one thread
    launched={"store_kvcache_kernel": Limits(max_registers=64, max_shared_bytes=0)},
    cases=CASES,
    drawn=st.builds(
        check_slots,
        st.integers(1, 12),
        st.sampled_from([1, 24, 64, 80, 128, 256]),
        st.lists(st.integers(0, 47), unique=True, max_size=48),
        dtype=st.sampled_from(DTYPES),
    ),
    compiled={
        f"{heads} x {dim}": Compilation(lambda dtype, _, heads=heads, dim=dim: launch(9, heads, dim, dtype))
        for heads, dim in [(8, 128), (4, 128), (2, 64), (3, 80), (8, 256)]
    },
    refused=Refused(
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
