"""Cases of varlen_attention_hopper: those of varlen_attention that it takes, and the edges of its own tiles. D52, D53

Without a GPU they run in tests/support/kernels/gluon_emulation.py, for the interpreter does not know Gluon.
"""

from dataclasses import replace
from functools import partial
from itertools import product

import torch
from hypothesis import strategies as st

from tests.kernels.varlen_attention_cases import (
    MIXED,
    Case,
    Inputs,
    assert_right,
    make_inputs,
    measured,
    meta_inputs,
)
from tests.kernels.varlen_attention_cases import run as run_varlen_attention
from tests.support.kernels.accuracy import assert_repeats
from tests.support.kernels.compiling import Compiled
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import Compilation, Kernel, Limits, lazy

varlen_attention_hopper = lazy("varlen_attention_hopper.varlen_attention_hopper")
takes = lazy("varlen_attention_hopper.takes")
NAME = "varlen_attention_hopper"
HALF, BFLOAT = torch.float16, torch.bfloat16


def run(case: Case, inputs: Inputs) -> torch.Tensor:
    assert takes(inputs.query, inputs.key, inputs.value)
    tensors = (inputs.query, inputs.key, inputs.value, inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    lengths = {"max_seqlen_q": case.max_seqlen_q, "block_tables": inputs.block_tables}
    return varlen_attention_hopper(*tensors, case.head_dim**-0.5, **lengths)


def check_case(case: Case, device: str) -> None:
    guards = Guards(device)
    inputs = make_inputs(case, device).on_guards(guards)
    with guards:
        output = run(case, inputs)
    guards.assert_intact()
    assert_right(inputs, output, NAME)


def check_packed_qkv(device: str) -> None:
    """Query, key and value are views of one tensor; what lies between is NaN."""
    case = Case(((5, 5), (130, 130)), 0, 4, 2, 64, HALF)
    plain = make_inputs(case, device)
    qkv = Guards(device).unwritten(len(plain.query), 9, 64, dtype=HALF)[:, :8]
    views = qkv.split([4, 2, 2], dim=1)
    for view, tensor in zip(views, (plain.query, plain.key, plain.value), strict=True):
        view.copy_(tensor)
    assert_right(plain, run(case, Inputs(*views, plain.cu_seqlens_q, plain.cu_seqlens_k, None)), NAME)


def check_far_block(device: str) -> None:
    """D52: a block whose elements lie beyond 2**31; keys and values share one cache of 4 GiB."""
    case = Case(((7, 40),), 16, 2, 1, 64, HALF)
    near = make_inputs(case, device)
    assert near.block_tables is not None
    num_blocks = 2**31 // near.key[0].numel() + 8
    far = torch.empty(num_blocks, *near.key.shape[1:], dtype=case.dtype, device=device)
    first = num_blocks - len(near.key)
    far[first:] = near.key
    output = run(case, replace(near, key=far, value=far, block_tables=near.block_tables + first))
    assert_right(replace(near, value=near.key), output, NAME)


def check_same_bits(block_size: int, device: str) -> None:
    """Also that no barrier is missed: a race would show as a change of bits."""
    case = Case(((900, 1500), (17, 17), (2000, 2000)), block_size, 16, 8, 128, BFLOAT)
    inputs = make_inputs(case, device)
    assert_repeats(lambda: run(case, inputs))


def check_long_prompts_come_here(k_len: int, is_taken: bool, device: str) -> None:
    """varlen_attention calls it, of itself, where it is faster."""
    from unittest.mock import patch

    from nanovllm.kernels import varlen_attention_hopper as module

    case = Case(((k_len, k_len),), 0, 4, 2, 128, BFLOAT, tiles=None)
    inputs = make_inputs(case, device)
    with patch.object(module, NAME, wraps=getattr(module, NAME)) as launcher:
        assert_right(inputs, run_varlen_attention(case, inputs))
    assert launcher.called == is_taken


def compilation(head_dim: int, group_size: int, block_size: int) -> Compilation:
    def launch(dtype: torch.dtype, _: int) -> None:
        varlen_attention_hopper(**meta_inputs(dtype, head_dim, block_size, num_heads=2 * group_size), scale=0.1)

    def uses_what_hopper_has(compiled: Compiled) -> None:
        assert "wgmma.mma_async" in compiled.ptx
        assert "cp.async.bulk.tensor" in compiled.ptx

    return Compilation(launch, ((90, HALF), (90, BFLOAT)), uses_what_hopper_has)


def edges(num_queries: int, last: int) -> Case:
    """Sequences that end at, before and behind the edge of a tile, of a block, of a copy."""
    k_len = max(last, num_queries)
    return Case(((num_queries, k_len), (1, 1), (num_queries, k_len)), 256, 4, 2, 128, BFLOAT)


GROUPED = ((129, 200), (3, 3), (64, 64))
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
}

KERNEL = Kernel(
    name=NAME,
    launched={"varlen_attention_hopper_kernel": Limits(max_registers=168)},
    cases={name: partial(check_case, case) for name, case in CASES.items()}
    | {
        f"{q} queries, {last} keys": partial(check_case, edges(q, last))
        for q, last in product((1, 65), (127, 128, 129))
    }
    | {"packed qkv": check_packed_qkv, "far block": check_far_block},
    on_gpu={
        f"mixed lengths, block size {size}, head size {dim}, {str(dtype)[6:]}": partial(
            check_case, Case(MIXED, size, 14, 2, dim, dtype)
        )
        for size in (0, 16, 64, 128, 256)
        for dim in (64, 128)
        for dtype in (HALF, BFLOAT)
    }
    | {
        f"{size} heads a group": partial(
            check_case, Case(((129, 200), (3, 3), (64, 64)), 256, 2 * size, 2, 128, BFLOAT)
        )
        for size in (1, 2, 4, 5, 8, 16, 64)
    }
    | {
        f"edges, {q} queries, {last} keys": partial(check_case, edges(q, last))
        for q in (1, 64, 65)
        for last in (1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513)
    }
    | {f"same bits, block size {size}": partial(check_same_bits, size) for size in (0, 16, 256)}
    | {
        f"{k_len} keys come {'here' if is_taken else 'elsewhere'}": partial(
            check_long_prompts_come_here, k_len, is_taken
        )
        for k_len, is_taken in ((511, False), (512, True))
    },
    drawn=st.builds(
        lambda pairs, kv_heads, group_size, head_dim, block_size: partial(
            check_case,
            Case(
                (*((queries, queries + cached + 1) for queries, cached in pairs), (1, 1)),
                block_size,
                kv_heads * group_size,
                kv_heads,
                head_dim,
                BFLOAT,
            ),
        ),
        st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=8),
        st.integers(1, 5),
        st.sampled_from([1, 2, 7]),
        st.sampled_from([64, 128]),
        st.sampled_from([0, 16, 256]),
    ),
    compiled={
        f"head size {dim}, {group_size} heads a group, block size {size}": compilation(dim, group_size, size)
        for dim in (64, 128)
        for group_size, size in [(1, 256), (4, 256), (7, 256), (2, 0), (7, 0), (2, 16), (2, 64)]
    },
    refused=None,  # varlen_attention has checked its inputs
    measured={NAME: partial(measured, prefill=varlen_attention_hopper)},
    capability=(9, 0),
)
