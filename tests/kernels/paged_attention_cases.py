"""Cases of paged_attention against reference.paged_attention. D52, D53"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.kernels.attention import measured_decode
from benchmarks.shapes import SHAPES
from tests.support.kernels.attention import AttentionCase, Inputs, meta_qkv, strided
from tests.support.kernels.compiling import Compiled
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

paged_attention, TileConfig = lazy("paged_attention.paged_attention"), lazy("paged_attention.TileConfig")
BFLOAT = torch.bfloat16


def decode(*context_lens: int) -> tuple[tuple[int, int], ...]:
    """One query a sequence."""
    return tuple((1, length) for length in context_lens)


@dataclass(frozen=True)
class Case(AttentionCase):
    kernel = "paged_attention"
    lengths: tuple[tuple[int, int], ...] = decode(1, 33, 0, 70)
    num_splits: int | None = 1
    tiles: tuple[int, int, int] | None = None
    is_ordered: bool = False

    def run(self, inputs: Inputs, **options: torch.Tensor) -> torch.Tensor:
        if self.is_ordered:
            options["sequence_order"] = inputs.context_lens.argsort(descending=True).int()
        if self.tiles is not None:
            options["tiles"] = TileConfig(*self.tiles)
        tensors = inputs.query, inputs.key, inputs.value, inputs.block_tables, inputs.context_lens
        return paged_attention(*tensors, num_splits=self.num_splits, **options)


SPLIT = {"num_splits": 3, "tiles": (16, 4, 2)}
CASES = {
    "ragged": Case(),
    "no context": Case(decode(0, 0)),
    "no sequences": Case(()),
    "one query head a kv head": Case(num_heads=2),
    "7 query heads a kv head": Case(num_heads=14),
    "20 query heads a kv head": Case(num_heads=20, num_kv_heads=1),
    "head size 128": Case(head_dim=128),
    "head size 256": Case(decode(33, 5), head_dim=256),
    "tile within a block": Case(block_size=64, tiles=(16, 4, 2)),
    "tile of 4 blocks": Case(tiles=(64, 4, 2)),
    "block size 256": Case(decode(256, 257), block_size=256, tiles=(64, 4, 2)),
    "3 splits of several tiles": Case(block_size=32, **SPLIT),
    "head size 64, split": Case(head_dim=64, **SPLIT),  # several programs combine a head
    "more splits than tiles": Case(decode(70, 5), num_splits=8, tiles=(16, 4, 2)),
    "7 query heads a kv head, split": Case(num_heads=7, num_kv_heads=1, num_splits=4, tiles=(16, 4, 2)),
    "more splits than are combined at once": Case(decode(1280), 16, 16, 1, num_splits=80, tiles=(16, 4, 2)),
    "splits by default": Case(num_splits=None),
    "in another order, split": Case(is_ordered=True, **SPLIT),
    "one key has all the weight": Case(query_size=1000.0, num_splits=2, tiles=(16, 4, 2)),
    "strides": Case(memory="strided_apart"),
    "far block": Case(decode(40), 16, 2, 1, 32, torch.float16, memory="far", num_splits=2, tiles=(16, 4, 2)),
}
CASES |= {
    f"{name}, float16": replace(CASES[name], dtype=torch.float16)
    for name in ("ragged", "7 query heads a kv head", "head size 128", "tile of 4 blocks", "3 splits of several tiles")
}


@case
def check_out(device: str, num_splits: int) -> None:
    """Rows of `out` that stand apart are written, and nothing between them."""
    one = Case(num_splits=num_splits)
    guards, inputs = Guards(device), one.make_inputs(device)
    wide = guards.unwritten(len(inputs.query), 8, 2 * one.head_dim, dtype=one.dtype)
    out = wide[:, ::2, : one.head_dim]
    with guards:
        assert one.run(inputs, out=out) is out
    inputs.assert_right(one.kernel, out)
    assert wide[:, 1::2].isnan().all()
    assert wide[:, :, one.head_dim :].isnan().all()


def check_order(device: str) -> None:
    """sequence_order is followed: if it names one sequence only, the others are not computed."""
    inputs = Case().make_inputs(device)
    out = torch.full_like(inputs.query, torch.nan)
    Case().run(inputs, out=out, sequence_order=torch.full_like(inputs.context_lens, 3))
    assert out.isnan().flatten(1).all(dim=1).tolist() == [True, True, True, False]


@case
def check_graph(device: str, num_splits: int | None) -> None:
    """Captured over contexts of 0, as a padded batch has them; then longer, shorter and none again."""
    whole = Case(decode(700, 3, 0, 256, 1025), 16, 16, 8, 128, BFLOAT, num_splits=num_splits)
    full = whole.make_inputs(device)
    assert full.block_tables is not None
    tables, lens = full.block_tables.clone(), torch.zeros_like(full.context_lens)
    live = replace(full, block_tables=tables, context_lens=lens)
    order = torch.arange(5, dtype=torch.int32, device=device)
    whole.run(live, sequence_order=order)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = whole.run(live, sequence_order=order)
    for rows in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 1, 2, 2, 1], [2, 2, 2, 2, 2]):
        tables.copy_(full.block_tables[rows])
        lens.copy_(full.context_lens[rows])
        order.copy_(lens.argsort(descending=True))
        output.fill_(torch.nan)
        graph.replay()
        live.assert_right(whole.kernel, output)


@case
def check_model(device: str, heads: tuple[int, int, int], dtype: torch.dtype, num_seqs: int, block_size: int) -> None:
    """Contexts drawn from 1 to 1800, the last one 2048; splits by default."""
    lengths = torch.randint(1, 1800, (num_seqs,), generator=torch.Generator().manual_seed(num_seqs)).tolist()
    Case(decode(*lengths[1:], 2048), block_size, *heads, dtype, num_splits=None)(device)


def meta_inputs(**shape) -> dict[str, torch.Tensor | None]:
    query, k_cache, v_cache, tables = meta_qkv(**shape)
    lens = meta(2, dtype=torch.int32)
    return {"query": query[:2], "k_cache": k_cache, "v_cache": v_cache, "block_tables": tables, "context_lens": lens}


def compilation(num_splits: int, group_size: int = 4, targets: tuple = ((90, BFLOAT),), **shape) -> Compilation:
    def launch(dtype: torch.dtype, capability: int) -> None:
        inputs = meta_inputs(dtype=dtype, num_heads=2 * group_size, **shape)
        paged_attention(**inputs, num_splits=num_splits, starts_early=capability >= 90)

    def waits_where_it_starts_early(compiled: Compiled) -> None:
        assert ("griddepcontrol.wait" in compiled.ptx) == (compiled.capability >= 90)

    return Compilation(launch, targets, waits_where_it_starts_early)


def launch_width(num_seqs: int, width: int, num_splits: int) -> None:
    """With block tables of that width."""
    tables, lens = meta(num_seqs, width, dtype=torch.int32), meta(num_seqs, dtype=torch.int32)
    caches = meta(100, 256, 8, 128), meta(100, 256, 8, 128)
    paged_attention(meta(num_seqs, 16, 128), *caches, tables, lens, num_splits=num_splits)


def refusals() -> tuple:
    half, integers = partial(meta, dtype=torch.float16), partial(meta, dtype=torch.int32)

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


KERNEL = Kernel(
    name="paged_attention",
    # Half of what a Hopper multiprocessor has, so that two programs share it.
    launched={
        "paged_attention_kernel": Limits(max_shared_bytes=113 * 1024),
        "combine_splits_kernel": Limits(max_shared_bytes=113 * 1024),
    },
    cases=CASES | {"out": check_out(1), "out, split": check_out(3), "order": check_order},
    on_gpu=each(
        check_model,
        heads={name: shape[:3] for name, shape in SHAPES.items()},
        dtype=DTYPES,
        num_seqs=(1, 8, 64),
        block_size=(16, 64, 256),
    )
    | {
        f"{name}, {'split by default' if num_splits is None else 'not split'}": make(num_splits)
        for num_splits in (1, None)
        for name, make in {
            "graph": check_graph,
            "longest context": lambda number: Case(decode(131072, 1), 256, 8, 2, 128, BFLOAT, num_splits=number),
        }.items()
    },
    drawn=st.builds(
        lambda lens, kv_heads, group_size, **shape: Case(
            decode(*lens), num_heads=kv_heads * group_size, num_kv_heads=kv_heads, **shape
        ),
        lens=st.lists(st.integers(0, 700), max_size=20),
        kv_heads=st.integers(1, 9),
        group_size=st.integers(1, 20),
        head_dim=st.sampled_from([32, 64, 128, 256]),
        block_size=st.sampled_from([16, 32, 64, 128, 256, 512]),
        dtype=st.sampled_from(DTYPES),
        num_splits=st.none() | st.integers(1, 80),
        is_ordered=st.booleans(),
    ),
    compiled={
        f"head size {dim}, split": compilation(
            8, targets=((90, torch.float32), (90, BFLOAT)), head_dim=dim, block_size=256
        )
        for dim in (32, 64, 128, 256)
    }
    | {
        f"head size {dim}, tiles of several blocks": compilation(1, head_dim=dim, block_size=16)
        for dim in (32, 64, 128, 256)
    }
    | {
        f"{group_size} heads a group": compilation(
            1, group_size, ((80, BFLOAT), (90, BFLOAT), (100, torch.float16)), head_dim=128, block_size=256
        )
        for group_size in (1, 7, 16)
    },
    refused=Refused(paged_attention, meta_inputs, refusals()),
    steps={
        "": Steps(lambda width: launch_width(64, width, 1)),  # not split: that is chosen by the number of sequences
        # splits combined at once: 2, 4, 8, 16, 32; and attention
        "split": Steps(lambda width: launch_width(1, width, min(17, 1 + width)), max_variants=6),
    },
    beyond_contract=frozenset({"order"}),
    measured={"paged_attention": measured_decode},
)
