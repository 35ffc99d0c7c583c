"""Cases of varlen_attention_hopper: those of varlen_attention that it takes, and the edges of its own tiles. D52, D53

Without a GPU they run in tests/support/kernels/gluon_emulation.py, for the interpreter does not know Gluon.
"""

from functools import partial
from itertools import product
from unittest.mock import patch

import torch
from hypothesis import strategies as st

from benchmarks.kernels.attention import measured_prefill
from tests.kernels.varlen_attention_cases import MIXED, default_tiles, meta_inputs
from tests.support.kernels.accuracy import assert_repeats
from tests.support.kernels.attention import AttentionCase, Inputs
from tests.support.kernels.compiling import Compiled
from tests.support.kernels.registry import Compilation, Kernel, Limits, case, each, lazy

varlen_attention_hopper = lazy("varlen_attention_hopper.varlen_attention_hopper")
takes = lazy("varlen_attention_hopper.takes")
NAME = "varlen_attention_hopper"
HALF, BFLOAT = torch.float16, torch.bfloat16


class Case(AttentionCase):
    kernel = NAME

    def run(self, inputs: Inputs) -> torch.Tensor:
        assert takes(inputs.query, inputs.key, inputs.value)
        tensors = inputs.query, inputs.key, inputs.value, inputs.cu_seqlens_q, inputs.cu_seqlens_k
        lengths = {"max_seqlen_q": self.max_seqlen_q, "block_tables": inputs.block_tables}
        return varlen_attention_hopper(*tensors, self.head_dim**-0.5, **lengths)


@case
def check_same_bits(device: str, block_size: int) -> None:
    """Also that no barrier is missed: a race would show as a change of bits."""
    one = Case(((900, 1500), (17, 17), (2000, 2000)), block_size, 16, 8, 128, BFLOAT)
    inputs = one.make_inputs(device)
    assert_repeats(lambda: one.run(inputs))


@case
def check_long_prompts_come_here(device: str, k_len: int, is_taken: bool) -> None:
    """varlen_attention calls it, of itself, where it is faster."""
    from nanovllm.kernels import varlen_attention_hopper as module

    with patch.object(module, NAME, wraps=getattr(module, NAME)) as launcher:
        default_tiles(((k_len, k_len),), 0, 4, 2, 128, BFLOAT)(device)
    assert launcher.called == is_taken


def compilation(head_dim: int, group_size: int, block_size: int, dtype: torch.dtype = BFLOAT) -> Compilation:
    def launch(dtype: torch.dtype, _: int) -> None:
        varlen_attention_hopper(
            **meta_inputs(dtype=dtype, head_dim=head_dim, block_size=block_size, num_heads=2 * group_size), scale=0.1
        )

    def uses_what_hopper_has(compiled: Compiled) -> None:
        assert "wgmma.mma_async" in compiled.ptx
        assert "cp.async.bulk.tensor" in compiled.ptx

    return Compilation(launch, ((90, dtype),), uses_what_hopper_has)


def edges(num_queries: int, last: int) -> Case:
    """Sequences that end at, before and behind the edge of a tile, of a block, of a copy."""
    k_len = max(last, num_queries)
    return Case(((num_queries, k_len), (1, 1), (num_queries, k_len)), 256, 4, 2, 128, BFLOAT)


SMALL = ((5, 5), (130, 300), (1, 129), (64, 64), (3, 260))
CASES = {
    "one query": Case(((1, 1),), 0, 2, 1, 64, HALF),
    "packed": Case(SMALL, 0, 4, 2, 64, HALF),
    "blocks of 16": Case(SMALL, 16, 4, 2, 64, HALF),
    "blocks of 64": Case(SMALL, 64, 4, 2, 64, HALF),
    "blocks of 128": Case(SMALL, 128, 4, 2, 64, HALF),
    "blocks of 256": Case(SMALL, 256, 4, 2, 64, HALF),
    "head size 128": Case(SMALL, 256, 4, 2, 128, HALF),
    "bfloat16": Case(SMALL, 16, 4, 2, 128, BFLOAT),
    "a ring's worth of tiles, and more": Case(((3, 700), (260, 900)), 256, 2, 1, 64, HALF),
    "sequences of nothing": Case(((0, 0), (3, 3), (0, 5)), 256, 2, 1, 64, HALF),
    "one query head a kv head": Case(SMALL, 256, 2, 2, 64, HALF),
    "7 query heads a kv head": Case(SMALL, 0, 7, 1, 64, HALF),
    "64 query heads a kv head": Case(((5, 200), (3, 3)), 256, 64, 1, 64, HALF),
    "one key has all the weight": Case(SMALL, 16, 4, 2, 64, HALF, query_size=60.0),
    "packed qkv": Case(((5, 5), (130, 130)), 0, 4, 2, 64, HALF, memory="strided"),
    "far block": Case(((7, 40),), 16, 2, 1, 64, HALF, memory="far"),
    **{f"{q} queries, {last} keys": edges(q, last) for q, last in product((1, 65), (127, 128, 129))},
}

KERNEL = Kernel(
    name=NAME,
    launched={"varlen_attention_hopper_kernel": Limits(max_registers=168)},
    cases=CASES,
    on_gpu=each(
        lambda block_size, head_dim, dtype: Case(MIXED, block_size, 14, 2, head_dim, dtype),
        block_size=(0, 16, 64, 128, 256),
        head_dim=(64, 128),
        dtype=(HALF, BFLOAT),
    )
    | each(
        lambda group_size: Case(((129, 200), (3, 3), (64, 64)), 256, 2 * group_size, 2, 128, BFLOAT),
        group_size=(1, 2, 4, 5, 8, 16, 64),
    )
    | each(edges, num_queries=(1, 64, 65), last=(1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513))
    | {f"same bits, block size {size}": check_same_bits(size) for size in (0, 16, 256)}
    | {"511 keys come elsewhere": check_long_prompts_come_here(511, False)}
    | {"512 keys come here": check_long_prompts_come_here(512, True)},
    drawn=st.builds(
        lambda pairs, kv_heads, group_size, **shape: Case(
            (*((queries, queries + cached + 1) for queries, cached in pairs), (1, 1)),
            num_heads=kv_heads * group_size,
            num_kv_heads=kv_heads,
            dtype=BFLOAT,
            **shape,
        ),
        pairs=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=8),
        kv_heads=st.integers(1, 5),
        group_size=st.sampled_from([1, 2, 7]),
        head_dim=st.sampled_from([64, 128]),
        block_size=st.sampled_from([0, 16, 256]),
    ),
    compiled={
        f"head size {dim}, {group_size} heads a group, block size {size}": compilation(dim, group_size, size)
        for dim in (64, 128)
        for group_size, size in [(1, 256), (7, 256), (7, 0), (2, 16), (2, 64)]
    }
    | {"float16": compilation(128, 4, 256, HALF)},
    refused=None,  # varlen_attention has checked its inputs
    measured={NAME: partial(measured_prefill, prefill=varlen_attention_hopper)},
    beyond_contract=frozenset(f"same bits, block size {size}" for size in (0, 16, 256)),
    capability=(9, 0),
)
