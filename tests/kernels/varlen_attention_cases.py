"""Cases of varlen_attention against reference.packing and reference.paged_attention. D07, D52, D53

It is one file, so that all that is known of the kernel is declared in one place.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import attend_one_by_one, cumulated, paged_cache, randn
from benchmarks.measuring import Measured
from benchmarks.shapes import SHAPES
from reference.packing import varlen_attention as reference_varlen_attention
from reference.paged_attention import paged_attention as reference_paged_attention
from tests.support.attention_cases import running_sum
from tests.support.kernels.accuracy import assert_repeats, assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.compiling import Compiled
from tests.support.kernels.guards import Guards
from tests.support.kernels.paged_cache import poisoned_caches
from tests.support.kernels.registry import EVERY_TARGET, Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

varlen_attention, TileConfig = lazy("varlen_attention.varlen_attention"), lazy("varlen_attention.TileConfig")
choose_tile_config = lazy("varlen_attention.choose_tile_config")
flash_attention_prefill = lazy("flash_attention.flash_attention_prefill")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Sequences of (number of queries, number of keys). block_size 0: key and value are packed."""

    lengths: tuple[tuple[int, int], ...]
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    tiles: tuple[int, int, int, int] | None = (16, 16, 4, 2)
    query_size: float = 1.0
    seed: int = 0

    @property
    def max_seqlen_q(self) -> int:
        return max((q_len for q_len, _ in self.lengths), default=0)


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_tables: torch.Tensor | None

    def on_guards(self, guards: Guards) -> "Inputs":
        def read(tensor: torch.Tensor) -> torch.Tensor:
            return guards.read(tensor)

        tables = None if self.block_tables is None else read(self.block_tables)
        cu_seqlens = read(self.cu_seqlens_q), read(self.cu_seqlens_k)
        return Inputs(read(self.query), read(self.key), read(self.value), *cu_seqlens, tables)

    def expected(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """What the reference computes in `dtype`."""
        query, key, value = (tensor.to(dtype) for tensor in (self.query, self.key, self.value))
        if self.block_tables is None:
            return reference_varlen_attention(query, key, value, self.cu_seqlens_q, self.cu_seqlens_k)
        context_lens = self.cu_seqlens_k.diff()
        return reference_paged_attention(query, key, value, self.block_tables, context_lens, self.cu_seqlens_q)


RAGGED = ((5, 5), (1, 1), (33, 33), (16, 16), (17, 17))
CACHED = ((5, 21), (1, 16), (17, 17), (3, 40), (1, 1), (16, 32), (2, 65))

CASES = {
    "one query": Case(((1, 1),)),
    "whole prompts": Case(RAGGED),
    "packed keys": Case(RAGGED, block_size=0),
    "cached keys": Case(CACHED),
    "packed keys, more than queries": Case(CACHED, block_size=0),
    "no sequences": Case(()),
    "sequences of nothing": Case(((0, 0), (3, 3), (0, 0), (0, 5))),
    "one query head a kv head": Case(CACHED, num_heads=2),
    "7 query heads a kv head": Case(CACHED, num_heads=7, num_kv_heads=1),
    "20 query heads a kv head": Case(((3, 9), (2, 2)), num_heads=20, num_kv_heads=1),
    "head size 64": Case(CACHED, head_dim=64),
    "head size 128": Case(CACHED, head_dim=128),
    "head size 256": Case(((3, 20), (5, 5)), head_dim=256),
    "tile within a block": Case(CACHED, block_size=64),
    "tile of 2 blocks": Case(CACHED, tiles=(16, 32, 4, 2)),
    "tile of 4 blocks": Case(CACHED, tiles=(32, 64, 4, 2)),
    "block size 256": Case(((5, 300), (40, 256), (3, 257)), block_size=256, tiles=(32, 64, 4, 2)),
    "more rows than keys in a tile": Case(CACHED, tiles=(64, 16, 4, 2)),
    "more keys than rows in a tile": Case(CACHED, block_size=0, tiles=(16, 64, 4, 2)),
    "tiles by default": Case(CACHED, tiles=None),
    "tiles by default, packed": Case(RAGGED, block_size=0, tiles=None),
    # So large that no two keys of a query have scores close to each other: between such, rounding would decide.
    "one key has all the weight": Case(CACHED, query_size=1e6),
}
CASES |= {
    f"{name}, float16": replace(CASES[name], dtype=torch.float16)
    for name in ("whole prompts", "packed keys", "cached keys", "7 query heads a kv head", "head size 128")
}


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    q_lens, k_lens = [q for q, _ in case.lengths], [k for _, k in case.lengths]
    query = torch.randn(sum(q_lens), case.num_heads, case.head_dim, generator=generator) * case.query_size
    query = query.to(device, case.dtype)
    cu_seqlens = running_sum(q_lens).to(device), running_sum(k_lens).to(device)
    if case.block_size:
        shape = (case.block_size, case.num_kv_heads, case.head_dim)
        key, value, tables = poisoned_caches(k_lens, *shape, case.dtype, case.seed, device)
        return Inputs(query, key, value, *cu_seqlens, tables)
    shape = (sum(k_lens), case.num_kv_heads, case.head_dim)
    key, value = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(2))
    return Inputs(query, key, value, *cu_seqlens, None)


def run(case: Case, inputs: Inputs) -> torch.Tensor:
    return varlen_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        max_seqlen_q=case.max_seqlen_q,
        block_tables=inputs.block_tables,
        tiles=None if case.tiles is None else TileConfig(*case.tiles),
    )


def assert_right(inputs: Inputs, output: torch.Tensor, kernel: str = "varlen_attention") -> None:
    """Off by at most twice what the reference errs in the inputs' own dtype, and one unit in the last place."""
    assert output.shape == inputs.query.shape
    if not len(output):
        return
    bounds = inputs.cu_seqlens_q.tolist()

    def place(index: tuple[int, ...]) -> str:
        sequence = bisect_right(bounds, index[0]) - 1
        return f"sequence {sequence}, query {index[0] - bounds[sequence]}, head {index[1]}, dimension {index[2]}"

    plain, exact = inputs.expected(output.dtype), inputs.expected()
    assert_within_twice_the_error_of_plain_torch(kernel, output, plain, exact, place)


def check_case(case: Case, device: str) -> None:
    guards = Guards(device)
    inputs = make_inputs(case, device).on_guards(guards)
    with guards:
        output = run(case, inputs)
    guards.assert_intact()
    assert_right(inputs, output)


def check_strides(block_size: int, device: str) -> None:
    """Views: query, key and value of a packed qkv, or caches of a cache of 2 layers that stores head by head and a
    narrow table of a wide one. What lies between is NaN."""
    case = Case(CACHED if block_size else RAGGED, block_size)
    plain = make_inputs(case, device)
    guards = Guards(device)
    qkv = guards.unwritten(len(plain.query), 8, case.head_dim, dtype=case.dtype)
    query, key, value = qkv.split([4, 2, 2], dim=1)
    tables = None
    if plain.block_tables is not None:
        num_blocks, _, heads, dim = plain.key.shape
        kv_cache = guards.unwritten(2, num_blocks, 2, heads, block_size, dim, dtype=case.dtype)
        key, value = kv_cache[:, :, 1].transpose(2, 3)
        tables = guards.unwritten(len(plain.block_tables), 20, dtype=torch.int32)[
            :, 3 : 3 + plain.block_tables.shape[1]
        ]
        tables.copy_(plain.block_tables)
    for view, tensor in zip((query, key, value), (plain.query, plain.key, plain.value), strict=True):
        view.copy_(tensor)
    cu_seqlens = guards.read(plain.cu_seqlens_q), guards.read(plain.cu_seqlens_k)
    with guards:
        output = run(case, Inputs(query, key, value, *cu_seqlens, tables))
    guards.assert_intact()
    assert_right(plain, output)


def check_far_block(device: str) -> None:
    """D52: a block whose elements lie beyond 2**31. Keys and values share one cache of 4 GiB, of which a CPU touches a
    few pages."""
    case = Case(((7, 40),), 16, 2, 1, 32, torch.float16)
    near = make_inputs(case, device)
    assert near.block_tables is not None
    num_blocks = 2**31 // near.key[0].numel() + 8
    far = torch.empty(num_blocks, *near.key.shape[1:], dtype=case.dtype, device=device)
    first = num_blocks - len(near.key)
    far[first:] = near.key
    output = run(case, replace(near, key=far, value=far, block_tables=near.block_tables + first))
    assert_right(replace(near, value=near.key), output)


def check_far_token(device: str) -> None:
    """D52: the second of two packed tokens lies beyond 2**31, and so it does in query, key and value alike."""
    case = Case(((1, 1), (1, 1)), 0, 1, 1, 32, torch.float16)
    near = make_inputs(case, device)
    far = torch.empty(2**31 + 64, dtype=case.dtype, device=device)
    views = [far[start:].as_strided(near.query.shape, (2**31 - 64, 32, 1)) for start in (0, 32, 64)]
    for view, tensor in zip(views, (near.query, near.key, near.value), strict=True):
        view.copy_(tensor)
    assert_right(near, run(case, Inputs(*views, near.cu_seqlens_q, near.cu_seqlens_k, None)))


def check_chunks(device: str) -> None:
    """D07: a prompt of 1000 in chunks of 300, 300 and 400, over the cache; each within the bound of the reference."""
    whole = Case(((1000, 1000),), 16, 4, 2, 128, torch.bfloat16, tiles=None)
    inputs = make_inputs(whole, device)
    for start, end in ((0, 300), (300, 600), (600, 1000)):
        bounds = {
            "cu_seqlens_q": torch.tensor([0, end - start], dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor([0, end], dtype=torch.int32, device=device),
        }
        chunk = replace(inputs, query=inputs.query[start:end], **bounds)
        assert_right(chunk, run(replace(whole, lengths=((end - start, end),)), chunk))


def check_same_bits(dtype: torch.dtype, block_size: int, device: str) -> None:
    case = Case(((900, 1500), (17, 17), (640, 640)), block_size, 16, 8, 128, dtype, tiles=None)
    inputs = make_inputs(case, device)
    assert_repeats(lambda: run(case, inputs))


def meta_inputs(
    dtype: torch.dtype = torch.float16, head_dim: int = 32, block_size: int = 16, num_heads: int = 4
) -> dict[str, torch.Tensor | int]:
    """Inputs of 2 sequences and 2 kv heads that have shapes and no contents; block_size 0: packed."""
    query, key, value = meta(300, num_heads + 4, head_dim, dtype=dtype).split([num_heads, 2, 2], dim=1)
    cu_seqlens = meta(3, dtype=torch.int32)
    inputs = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    inputs |= {"max_seqlen_q": 200}
    if block_size:
        inputs["key"], inputs["value"] = meta(2, 100, block_size, 2, head_dim, dtype=dtype)
        inputs["block_tables"] = meta(2, 4096 // block_size, dtype=torch.int32)
    return inputs


def compilation(group_size: int, targets: tuple, **shape: int) -> Compilation:
    def launch(dtype: torch.dtype, capability: int) -> None:
        tiles = choose_tile_config(dtype, shape["head_dim"], (capability // 10, 0))
        varlen_attention(**meta_inputs(dtype, num_heads=2 * group_size, **shape), tiles=tiles)

    def does_not_round_float32(compiled: Compiled) -> None:
        """The bound of the GPU tests is that of plain PyTorch in float32, so this says why if it fails."""
        assert compiled.dtype != "float32" or "tf32" not in compiled.ptx

    return Compilation(launch, targets, does_not_round_float32)


def launch_step(size: int) -> None:
    """size: of the prompt, and of the block tables' width."""
    tables, cu_seqlens = meta(2, size, dtype=torch.int32), meta(3, dtype=torch.int32)
    arguments = meta(size, 16, 128), meta(100, 256, 8, 128), meta(100, 256, 8, 128), cu_seqlens, cu_seqlens
    varlen_attention(*arguments, max_seqlen_q=size, block_tables=tables, tiles=TileConfig(64, 64, 4, 3))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Its like, of which the last dimension is not contiguous."""
    return torch.empty((*tensor.shape, 2), dtype=tensor.dtype, device="meta")[..., 0]


def refusals() -> tuple:
    def half(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=torch.float16)

    def both(*shape: int) -> dict[str, torch.Tensor]:
        return {"key": half(*shape), "value": half(*shape)}

    packed = {"block_tables": None, **both(300, 2, 32)}
    return (
        ({"query": half(300, 4, 96), **both(9, 16, 2, 96)}, "head_dim must be one of"),
        (both(9, 16, 2, 64), "head_dim must be one of"),
        ({"value": half(9, 16, 1, 32)}, "value must have the shape of key"),
        (both(9, 8, 2, 32), "block_size must be a power of two from 16"),
        (both(9, 48, 2, 32), "block_size must be a power of two from 16"),
        (both(300, 2, 32), "key must have 3 dimensions, 4 with block_tables"),
        ({"query": half(300, 5, 32)}, "must be a multiple of key's"),
        ({"block_tables": meta(3, 8, dtype=torch.int32)}, "block_tables must have a row a sequence"),
        ({"cu_seqlens_k": meta(4, dtype=torch.int32)}, "cu_seqlens_q and cu_seqlens_k must be"),
        *(({name: torch.Tensor.float}, "must have one dtype") for name in ("query", "key", "value")),
        *(({name: torch.Tensor.long}, "must be int32") for name in ("cu_seqlens_q", "cu_seqlens_k", "block_tables")),
        *(({name: strided}, "last dimensions must be contiguous") for name in ("query", "key", "value")),
        ({**packed, "query": strided}, "last dimensions must be contiguous"),
        *(({**packed, name: strided(packed["key"])}, "dimensions must be contiguous") for name in ("key", "value")),
        *(({"scale": scale}, "scale must be above 0") for scale in (0.0, -1.0, float("nan"))),
    )


def measured(
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


MIXED = ((5, 5), (1024, 1024), (300, 1001), (1, 700), (513, 513), (64, 320), (3, 3))
LAYOUTS = {"packed": 0, "blocks of 16": 16, "blocks of 256": 256}

KERNEL = Kernel(
    name="varlen_attention",
    launched={"varlen_attention_kernel": Limits()},
    cases={name: partial(check_case, case) for name, case in CASES.items()}
    | {"strides, packed": partial(check_strides, 0), "strides, paged": partial(check_strides, 16)}
    | {"far block": check_far_block, "far token": check_far_token},
    on_gpu={
        f"{name}, {layout}, {str(dtype)[6:]}": partial(
            check_case, Case(MIXED, LAYOUTS[layout], *shape[:3], dtype, tiles=None)
        )
        for name, shape in SHAPES.items()
        for dtype in DTYPES
        for layout in ("packed", "blocks of 256")
    }
    | {
        f"head size {dim}, {layout}, {str(dtype)[6:]}": partial(
            check_case, Case(((70, 200), (129, 129), (1, 64)), size, 4, 2, dim, dtype, tiles=None)
        )
        for dim in (32, 64, 128, 256)
        for dtype in DTYPES
        for layout, size in LAYOUTS.items()
    }
    | {
        f"long prompt, {layout}": partial(
            check_case, Case(((4100, 4100), (100, 9000)), size, 4, 2, 128, torch.bfloat16, tiles=None)
        )
        for layout, size in LAYOUTS.items()
    }
    | {
        f"same bits, {layout}, {str(dtype)[6:]}": partial(check_same_bits, dtype, size)
        for layout, size in LAYOUTS.items()
        for dtype in DTYPES
    }
    | {"chunks": check_chunks},
    drawn=st.builds(
        lambda pairs, kv_heads, group_size, head_dim, block_size, dtype: partial(
            check_case,
            Case(
                tuple((queries, queries + cached) for queries, cached in pairs),
                block_size,
                kv_heads * group_size,
                kv_heads,
                head_dim,
                dtype,
                tiles=None,
            ),
        ),
        st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=8),
        st.integers(1, 5),
        st.sampled_from([1, 2, 7]),
        st.sampled_from([64, 128]),
        st.sampled_from([0, 16, 64, 512]),
        st.sampled_from(DTYPES),
    ),
    compiled={
        f"head size {dim}, {layout}": compilation(2, tuple((90, d) for d in DTYPES), head_dim=dim, block_size=size)
        for dim in (32, 64, 128, 256)
        for layout, size in LAYOUTS.items()
    }
    | {
        f"head size {dim}, {group_size} heads a group": compilation(
            group_size,
            tuple(target for target in EVERY_TARGET if target[1] == torch.bfloat16),
            head_dim=dim,
            block_size=256,
        )
        for dim in (32, 64, 128, 256)
        for group_size in (1, 7)
    },
    refused=Refusals(varlen_attention, meta_inputs, refusals()),
    steps={"": Steps(launch_step)},
    measured={"varlen_attention": partial(measured, prefill=portable), "prefill": measured},
)
