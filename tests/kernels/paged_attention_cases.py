"""Cases of paged_attention against reference.paged_attention. D52, D53

It is one file, so that all that is known of the kernel is declared in one place.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import MAX_MODEL_LEN, attend_one_by_one, int32, paged_cache, randn
from benchmarks.measuring import Measured
from benchmarks.shapes import SHAPES
from reference.paged_attention import paged_attention as reference_paged_attention
from tests.support.kernels.accuracy import assert_repeats, assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.compiling import Compiled
from tests.support.kernels.guards import Guards
from tests.support.kernels.paged_cache import poisoned_caches
from tests.support.kernels.registry import Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

paged_attention, TileConfig = lazy("paged_attention.paged_attention"), lazy("paged_attention.TileConfig")
flash_attention_decode = lazy("flash_attention.flash_attention_decode")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    context_lens: tuple[int, ...] = (1, 33, 0, 70)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    query_size: float = 1.0
    num_splits: int | None = 1
    tiles: tuple[int, int, int] | None = None
    is_ordered: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.k_cache, self.v_cache, self.block_tables, self.context_lens

    def expected(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        query, k_cache, v_cache = (tensor.to(dtype) for tensor in self.tensors()[:3])
        return reference_paged_attention(query, k_cache, v_cache, self.block_tables, self.context_lens)

    def on_guards(self, guards: Guards) -> "Inputs":
        return Inputs(*(guards.read(tensor) for tensor in self.tensors()))


CASES = {
    "one key": Case((1,)),
    "ragged": Case(),
    "no context": Case((0, 0)),
    "no sequences": Case(()),
    "one query head a kv head": Case(num_heads=2),
    "7 query heads a kv head": Case(num_heads=14),
    "20 query heads a kv head": Case(num_heads=20, num_kv_heads=1),
    "head size 64": Case(head_dim=64),
    "head size 128": Case(head_dim=128),
    "head size 256": Case((33, 5), head_dim=256),
    "tile within a block": Case(block_size=64, tiles=(16, 4, 2)),
    "tile is a block": Case(block_size=32, tiles=(32, 4, 2)),
    "tile of 4 blocks": Case(tiles=(64, 4, 2)),
    "block size 256": Case((256, 257), block_size=256, tiles=(64, 4, 2)),
    "2 splits": Case(num_splits=2, tiles=(16, 4, 2)),
    "3 splits of several tiles": Case(num_splits=3, block_size=32, tiles=(16, 4, 2)),
    "head size 64, split": Case(head_dim=64, num_splits=3, tiles=(16, 4, 2)),  # several programs combine a head
    "more splits than tiles": Case((70, 5), num_splits=8, tiles=(16, 4, 2)),
    "7 query heads a kv head, split": Case(num_heads=7, num_kv_heads=1, num_splits=4, tiles=(16, 4, 2)),
    "more splits than are combined at once": Case((1280,), 16, 1, num_splits=80, tiles=(16, 4, 2)),
    "splits by default": Case(num_splits=None),
    "in another order": Case(is_ordered=True),
    "in another order, split": Case(is_ordered=True, num_splits=3, tiles=(16, 4, 2)),
    "one key has all the weight": Case(query_size=1000.0, num_splits=2, tiles=(16, 4, 2)),
}
CASES |= {
    f"{name}, float16": replace(CASES[name], dtype=torch.float16)
    for name in ("ragged", "7 query heads a kv head", "head size 128", "tile of 4 blocks", "3 splits of several tiles")
}


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    caches = poisoned_caches(
        list(case.context_lens), case.block_size, case.num_kv_heads, case.head_dim, case.dtype, case.seed, device
    )
    shape = (len(case.context_lens), case.num_heads, case.head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)) * case.query_size
    context_lens = torch.tensor(case.context_lens, dtype=torch.int32, device=device)
    return Inputs(query.to(device, case.dtype), *caches, context_lens)


def run(case: Case, inputs: Inputs, **options) -> torch.Tensor:
    if case.is_ordered:
        options["sequence_order"] = inputs.context_lens.argsort(descending=True).int()
    if case.tiles is not None:
        options["tiles"] = TileConfig(*case.tiles)
    return paged_attention(*inputs.tensors(), num_splits=case.num_splits, **options)


def assert_right(inputs: Inputs, output: torch.Tensor) -> None:
    """Off by at most twice what the reference errs in the inputs' own dtype, and one unit in the last place."""
    if len(output):
        plain, exact = inputs.expected(output.dtype), inputs.expected()
        assert_within_twice_the_error_of_plain_torch(
            "paged_attention", output, plain, exact, ("sequence", "head", "dimension")
        )


def check_case(case: Case, device: str) -> None:
    guards = Guards(device)
    inputs = make_inputs(case, device).on_guards(guards)
    with guards:
        output = run(case, inputs)
    guards.assert_intact()
    assert output.shape == inputs.query.shape
    assert_right(inputs, output)


def check_strides(num_splits: int, device: str) -> None:
    """Views: query of a packed qkv, keys of a cache of 2 layers that stores head by head, values of one that stores
    token by token, a narrow table of a wide one, every other row of out. What lies between is NaN and stays."""
    case = Case(num_splits=num_splits)
    plain = make_inputs(case, device)
    guards = Guards(device)
    qkv = guards.unwritten(*plain.query.shape[:1], 8, case.head_dim, dtype=case.dtype)
    num_blocks, block_size, heads, dim = plain.k_cache.shape
    k_caches = guards.unwritten(num_blocks, 2, heads, block_size, dim, dtype=case.dtype)
    v_caches = guards.unwritten(2, num_blocks, block_size, heads + 1, dim, dtype=case.dtype)
    tables = guards.unwritten(len(plain.block_tables), 20, dtype=torch.int32)
    table = tables[:, 3 : 3 + plain.block_tables.shape[1]]
    views = (qkv[:, :4], k_caches[:, 1].transpose(1, 2), v_caches[1, :, :, 1:], table)
    for view, tensor in zip(views, plain.tensors(), strict=False):
        view.copy_(tensor)
    wide_out = guards.unwritten(len(qkv), 8, 2 * dim, dtype=case.dtype)
    out = wide_out[:, ::2, :dim]
    with guards:
        output = run(case, Inputs(*views, guards.read(plain.context_lens)), out=out)
    guards.assert_intact()
    assert output is out
    assert_right(plain, out)
    assert wide_out[:, 1::2].isnan().all()
    assert wide_out[:, :, dim:].isnan().all()


def check_order(device: str) -> None:
    """sequence_order is followed: if it names one sequence only, the others are not computed."""
    inputs = make_inputs(Case(), device)
    out = torch.full_like(inputs.query, torch.nan)
    order = torch.full_like(inputs.context_lens, 3)
    run(Case(), inputs, out=out, sequence_order=order)
    assert out.isnan().flatten(1).all(dim=1).tolist() == [True, True, True, False]


def check_far_block(device: str) -> None:
    """D52: a block whose elements lie beyond 2**31. Keys and values share one cache of 4 GiB, of which a CPU touches a
    few pages."""
    case = Case((40,), 2, 1, head_dim=32, block_size=16, dtype=torch.float16, num_splits=2, tiles=(16, 4, 2))
    near = make_inputs(case, device)
    num_blocks = 2**31 // near.k_cache[0].numel() + 8
    far = torch.empty(num_blocks, *near.k_cache.shape[1:], dtype=case.dtype, device=device)
    first = num_blocks - len(near.k_cache)
    far[first:] = near.k_cache
    output = run(case, replace(near, k_cache=far, v_cache=far, block_tables=near.block_tables + first))
    assert_right(replace(near, v_cache=near.k_cache), output)


def check_graph(num_splits: int | None, device: str) -> None:
    """Captured over contexts of 0, as a padded batch has them; then longer, shorter and none again."""
    case = Case((700, 3, 0, 256, 1025), 16, 8, 128, 16, torch.bfloat16, num_splits=num_splits)
    full = make_inputs(case, device)
    order = torch.arange(5, dtype=torch.int32, device=device)
    live = replace(full, block_tables=full.block_tables.clone(), context_lens=torch.zeros_like(full.context_lens))
    run(case, live, sequence_order=order)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(case, live, sequence_order=order)
    for rows in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 1, 2, 2, 1], [2, 2, 2, 2, 2]):
        step = replace(full, block_tables=full.block_tables[rows], context_lens=full.context_lens[rows])
        live.block_tables.copy_(step.block_tables)
        live.context_lens.copy_(step.context_lens)
        order.copy_(step.context_lens.argsort(descending=True))
        output.fill_(torch.nan)
        graph.replay()
        assert_right(step, output)


def check_same_bits(num_splits: int | None, device: str) -> None:
    case = Case((900, 17, 2000, 64), 16, 8, 128, 256, torch.bfloat16, num_splits=num_splits)
    inputs = make_inputs(case, device)
    assert_repeats(lambda: run(case, inputs))


def lengths_like(num_seqs: int) -> tuple[int, ...]:
    """Drawn from 1 to 1800, the last one 2048."""
    generator = torch.Generator().manual_seed(num_seqs)
    return (*torch.randint(1, 1800, (num_seqs,), generator=generator).tolist()[1:], 2048)


def meta_inputs(
    dtype: torch.dtype = torch.float16, head_dim: int = 32, block_size: int = 16, num_heads: int = 4
) -> dict[str, torch.Tensor]:
    """Inputs of 2 sequences and 2 kv heads that have shapes and no contents."""
    caches = meta(2, 4, 100, block_size, 2, head_dim, dtype=dtype)
    return {
        "query": meta(2, num_heads + 4, head_dim, dtype=dtype)[:, :num_heads],
        "k_cache": caches[0, 0],
        "v_cache": caches[1, 0],
        "block_tables": meta(2, 4096 // block_size, dtype=torch.int32),
        "context_lens": meta(2, dtype=torch.int32),
    }


def compilation(num_splits: int, group_size: int = 4, targets: tuple = ((90, torch.bfloat16),), **shape) -> Compilation:
    def launch(dtype: torch.dtype, capability: int) -> None:
        inputs = meta_inputs(dtype, num_heads=2 * group_size, **shape)
        paged_attention(**inputs, num_splits=num_splits, starts_early=capability >= 90)

    def waits_where_it_starts_early(compiled: Compiled) -> None:
        assert ("griddepcontrol.wait" in compiled.ptx) == (compiled.capability >= 90)

    return Compilation(launch, targets, waits_where_it_starts_early)


def launch_wider_tables(width: int) -> None:
    """Not split: splitting is chosen by the number of sequences."""
    tables, lens = meta(64, width, dtype=torch.int32), meta(64, dtype=torch.int32)
    paged_attention(meta(64, 16, 128), *(meta(100, 256, 8, 128) for _ in range(2)), tables, lens, num_splits=1)


def launch_split(width: int) -> None:
    tables, lens = meta(1, width, dtype=torch.int32), meta(1, dtype=torch.int32)
    caches = meta(100, 256, 8, 128), meta(100, 256, 8, 128)
    paged_attention(meta(1, 16, 128), *caches, tables, lens, num_splits=min(17, 1 + width))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Its like, of which the last dimension is not contiguous."""
    return torch.empty((*tensor.shape, 2), dtype=tensor.dtype, device="meta")[..., 0]


def refusals() -> tuple:
    def half(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=torch.float16)

    def integers(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=torch.int32)

    def both(*shape: int) -> dict[str, torch.Tensor]:
        return {"k_cache": half(*shape), "v_cache": half(*shape)}

    return (
        ({"query": half(2, 4, 96), **both(9, 16, 2, 96)}, "head_dim must be one of"),
        ({"v_cache": half(9, 16, 1, 32)}, "one shape"),
        (both(9, 16, 2, 64), "query's head_dim"),
        (both(9, 8, 2, 32), "block_size must be a power of two from 16"),
        (both(9, 48, 2, 32), "block_size must be a power of two from 16"),
        ({"query": half(2, 5, 32)}, "must be a multiple of k_cache's"),
        ({"block_tables": integers(3, 8)}, "a row a query"),
        ({"context_lens": integers(3)}, "a row a query"),
        ({"sequence_order": integers(3)}, "sequence_order must be"),
        ({"out": half(2, 4, 16)}, "out must have"),
        *(({name: torch.Tensor.float}, "must have one dtype") for name in ("query", "k_cache", "v_cache")),
        (dict.fromkeys(("query", "k_cache", "v_cache"), torch.Tensor.double), "float32, float16 or bfloat16"),
        *(({name: torch.Tensor.long}, "must be int32") for name in ("block_tables", "context_lens")),
        *(
            ({name: strided}, "last dimensions must be contiguous")
            for name in ("query", "k_cache", "v_cache", "block_tables")
        ),
    )


def measured(lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> Measured:
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


KERNEL = Kernel(
    name="paged_attention",
    # Half of what a Hopper multiprocessor has, so that two programs share it.
    launched={
        "paged_attention_kernel": Limits(max_shared_bytes=113 * 1024),
        "combine_splits_kernel": Limits(max_shared_bytes=113 * 1024),
    },
    cases={name: partial(check_case, case) for name, case in CASES.items()}
    | {"strides": partial(check_strides, 1), "strides, split": partial(check_strides, 3)}
    | {"order": check_order, "far block": check_far_block},
    on_gpu={
        f"{name}, {num_seqs} sequences, blocks of {size}, {str(dtype)[6:]}": partial(
            check_case, Case(lengths_like(num_seqs), *shape[:3], size, dtype, num_splits=None)
        )
        for name, shape in SHAPES.items()
        for dtype in DTYPES
        for num_seqs in (1, 8, 64)
        for size in (16, 64, 256)
    }
    | {
        f"{name}, {'split by default' if num_splits is None else 'not split'}": partial(check, num_splits)
        for num_splits in (1, None)
        for name, check in {"graph": check_graph, "same bits": check_same_bits}.items()
    }
    | {
        f"longest context, num_splits={num_splits}": partial(
            check_case, Case((131072, 1), 8, 2, 128, 256, torch.bfloat16, num_splits=num_splits)
        )
        for num_splits in (1, None)
    },
    drawn=st.builds(
        lambda lens, kv_heads, group_size, head_dim, block_size, dtype, num_splits, is_ordered: partial(
            check_case,
            Case(
                lens,
                kv_heads * group_size,
                kv_heads,
                head_dim,
                block_size,
                dtype,
                num_splits=num_splits,
                is_ordered=is_ordered,
            ),
        ),
        st.lists(st.integers(0, 700), max_size=20).map(tuple),
        st.integers(1, 9),
        st.integers(1, 20),
        st.sampled_from([32, 64, 128, 256]),
        st.sampled_from([16, 32, 64, 128, 256, 512]),
        st.sampled_from(DTYPES),
        st.none() | st.integers(1, 80),
        st.booleans(),
    ),
    compiled={
        f"head size {dim}, split": compilation(8, targets=tuple((90, d) for d in DTYPES), head_dim=dim, block_size=256)
        for dim in (32, 64, 128, 256)
    }
    | {
        f"head size {dim}, tiles of several blocks": compilation(1, head_dim=dim, block_size=16)
        for dim in (32, 64, 128, 256)
    }
    | {
        f"{group_size} heads a group": compilation(
            1, group_size, tuple((c, torch.bfloat16) for c in (80, 90, 100)), head_dim=128, block_size=256
        )
        for group_size in (1, 7, 16)
    },
    refused=Refusals(paged_attention, meta_inputs, refusals()),
    steps={
        "": Steps(launch_wider_tables),
        "split": Steps(launch_split, max_variants=6),  # splits combined at once: 2, 4, 8, 16, 32; and attention
    },
    measured={"paged_attention": measured},
)
