"""Cases of varlen_attention against reference.packing and reference.paged_attention. D07, D52, D53"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.kernels.attention import measured_prefill, portable
from benchmarks.shapes import SHAPES
from tests.support.kernels.attention import AttentionCase, Inputs, meta_qkv, strided
from tests.support.kernels.compiling import Compiled
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, each, lazy, meta

varlen_attention, TileConfig = lazy("varlen_attention.varlen_attention"), lazy("varlen_attention.TileConfig")
choose_tile_config = lazy("varlen_attention.choose_tile_config")


@dataclass(frozen=True)
class Case(AttentionCase):
    kernel = "varlen_attention"
    tiles: tuple[int, int, int, int] | None = (16, 16, 4, 2)

    def run(self, inputs: Inputs) -> torch.Tensor:
        tensors = inputs.query, inputs.key, inputs.value, inputs.cu_seqlens_q, inputs.cu_seqlens_k
        tiles = None if self.tiles is None else TileConfig(*self.tiles)
        options = {"max_seqlen_q": self.max_seqlen_q, "block_tables": inputs.block_tables}
        return varlen_attention(*tensors, **options, tiles=tiles)


RAGGED = ((5, 5), (1, 1), (33, 33), (16, 16), (17, 17))
CACHED = ((5, 21), (1, 16), (17, 17), (3, 40), (1, 1), (16, 32), (2, 65))

CASES = {
    "whole prompts": Case(RAGGED),
    "packed keys": Case(RAGGED, block_size=0),
    "cached keys": Case(CACHED),
    "packed keys, more than queries": Case(CACHED, block_size=0),
    "no sequences": Case(()),
    "sequences of nothing": Case(((0, 0), (3, 3), (0, 0), (0, 5))),
    "one query head a kv head": Case(CACHED, num_heads=2),
    "7 query heads a kv head": Case(CACHED, num_heads=7, num_kv_heads=1),
    "20 query heads a kv head": Case(((3, 9), (2, 2)), num_heads=20, num_kv_heads=1),
    "head size 128": Case(CACHED, head_dim=128),
    "head size 256": Case(((3, 20), (5, 5)), head_dim=256),
    "tile of 4 blocks": Case(CACHED, tiles=(32, 64, 4, 2)),
    "block size 256": Case(((5, 300), (40, 256), (3, 257)), block_size=256, tiles=(32, 64, 4, 2)),
    "more rows than keys in a tile": Case(CACHED, tiles=(64, 16, 4, 2)),
    "more keys than rows in a tile": Case(CACHED, block_size=0, tiles=(16, 64, 4, 2)),
    "tiles by default": Case(CACHED, tiles=None),
    # So large that no two keys of a query have scores close to each other: between such, rounding would decide.
    "one key has all the weight": Case(CACHED, query_size=1e6),
    "strides, packed": Case(RAGGED, 0, memory="strided"),
    "strides, paged": Case(CACHED, 16, memory="strided"),
    "far block": Case(((7, 40),), 16, 2, 1, 32, torch.float16, memory="far"),
    "far token": Case(((1, 1), (1, 1)), 0, 1, 1, 32, torch.float16, memory="far"),
}
CASES |= {
    f"{name}, float16": replace(CASES[name], dtype=torch.float16)
    for name in ("whole prompts", "packed keys", "cached keys", "7 query heads a kv head", "head size 128")
}


LAYOUTS = {"packed": 0, "blocks of 16": 16, "blocks of 256": 256}
MIXED = ((5, 5), (1024, 1024), (300, 1001), (1, 700), (513, 513), (64, 320), (3, 3))
default_tiles = partial(Case, tiles=None)


def meta_inputs(**shape) -> dict[str, torch.Tensor | int | None]:
    query, key, value, tables = meta_qkv(**shape)
    inputs = {"query": query, "key": key, "value": value, "block_tables": tables, "max_seqlen_q": 200}
    return inputs | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), meta(3, dtype=torch.int32))


def compilation(
    head_dim: int = 128, block_size: int = 256, group_size: int = 7, targets: tuple = ((90, torch.bfloat16),)
) -> Compilation:
    def launch(dtype: torch.dtype, capability: int) -> None:
        tiles = choose_tile_config(dtype, head_dim, (capability // 10, 0))
        shape = {"num_heads": 2 * group_size, "block_size": block_size, "head_dim": head_dim}
        varlen_attention(**meta_inputs(dtype=dtype, **shape), tiles=tiles)

    def does_not_round_float32(compiled: Compiled) -> None:
        """The bound of the GPU tests is that of plain PyTorch in float32, so this says why if it fails."""
        assert compiled.dtype != "float32" or "tf32" not in compiled.ptx

    return Compilation(launch, targets, does_not_round_float32)


def launch_step(size: int) -> None:
    """size: of the prompt, and of the block tables' width."""
    tables, cu_seqlens = meta(2, size, dtype=torch.int32), meta(3, dtype=torch.int32)
    arguments = meta(size, 16, 128), meta(100, 256, 8, 128), meta(100, 256, 8, 128), cu_seqlens, cu_seqlens
    varlen_attention(*arguments, max_seqlen_q=size, block_tables=tables, tiles=TileConfig(64, 64, 4, 3))


def refusals() -> tuple:
    half = partial(meta, dtype=torch.float16)

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


KERNEL = Kernel(
    name="varlen_attention",
    launched={"varlen_attention_kernel": Limits()},
    cases=CASES,
    on_gpu=each(
        lambda shape, layout, dtype: default_tiles(MIXED, layout, *shape[:3], dtype),
        shape=SHAPES,
        layout={name: LAYOUTS[name] for name in ("packed", "blocks of 256")},
        dtype=DTYPES,
    )
    | each(
        lambda head_size, layout, dtype: default_tiles(
            ((70, 200), (129, 129), (1, 64)), layout, head_dim=head_size, dtype=dtype
        ),
        head_size=(32, 64, 128, 256),
        layout=LAYOUTS,
        dtype=DTYPES,
    )
    | {
        f"long prompt, {name}": default_tiles(((4100, 4100), (100, 9000)), size, head_dim=128, dtype=torch.bfloat16)
        for name, size in LAYOUTS.items()
    },
    drawn=st.builds(
        lambda pairs, kv_heads, group_size, **shape: default_tiles(
            tuple((queries, queries + cached) for queries, cached in pairs),
            num_heads=kv_heads * group_size,
            num_kv_heads=kv_heads,
            **shape,
        ),
        pairs=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=8),
        kv_heads=st.integers(1, 5),
        group_size=st.sampled_from([1, 2, 7]),
        head_dim=st.sampled_from([64, 128]),
        block_size=st.sampled_from([0, 16, 64, 512]),
        dtype=st.sampled_from(DTYPES),
    ),
    compiled={f"head size {dim}": compilation(dim, targets=Compilation.targets) for dim in (32, 64, 128, 256)}
    | {
        f"head size {dim}, {layout}": compilation(dim, LAYOUTS[layout])
        for dim in (32, 64, 128, 256)
        for layout in ("packed", "blocks of 16")
    }
    | {f"{number} heads a group": compilation(group_size=number) for number in (1, 2)},
    refused=Refused(varlen_attention, meta_inputs, refusals()),
    steps={"": Steps(launch_step)},
    measured={"varlen_attention": partial(measured_prefill, prefill=portable), "prefill": measured_prefill},
)
