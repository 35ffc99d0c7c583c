"""Cases of silu_and_mul against reference.silu_and_mul. D50, D52"""

from itertools import product

import torch
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from reference.silu_and_mul import silu_and_mul as reference_silu_and_mul
from tests.support.kernels.accuracy import assert_like_reference
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

silu_and_mul = lazy("silu_and_mul.silu_and_mul")
SIZES = (768, 3072, 4864, 14336)  # qwen3-30b-a3b's experts, qwen3-0.6b, qwen2.5-0.5b, llama-3-8b


@case
def check_shape(device: str, shape: tuple[int, int], dtype: torch.dtype, spare: int = 0, **tiles: int) -> None:
    """shape: tokens and size of the output. x has `spare` elements between its rows."""
    guards, (num_tokens, size) = Guards(device), shape
    x = guards.randn(num_tokens, 2 * size + spare, std=4, dtype=dtype)[:, : 2 * size]
    with guards:
        y = silu_and_mul(x, **tiles)
    assert_like_reference("silu_and_mul", y, reference_silu_and_mul, (x,), ("token", "element"))


def check_large_gates(device: str) -> None:
    """exp(-gate) is beyond float32 on one side and 0 on the other: silu is 0 and the gate itself, never NaN."""
    x = torch.tensor([[-1000.0, 1000.0, 3.0, 2.0]], device=device)
    assert silu_and_mul(x).tolist() == [[0.0, 2000.0]]


def check_far_row(device: str) -> None:
    """D52: rows whose elements lie beyond 2**31, in a view of 4 GiB, of which a CPU touches three pages."""
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.arange(3)[:, None] + 32)  # silu(32) is 32 in float16
    assert silu_and_mul(x)[:, -1].tolist() == [32**2, 33**2, 34**2]


def launch_small_and_large(size: int, dtype: torch.dtype) -> None:
    for num_tokens in (1, 256, 16384):
        silu_and_mul(meta(num_tokens, 2 * size, dtype=dtype))


def measured(shape: Shape, num_tokens: int) -> Measured:
    num_rows = num_tokens * max(1, shape.top_k)  # a row for each expert that a token goes to
    size = shape.intermediate_size

    def plain(x):
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    return Measured(
        make=lambda index: (randn(index, num_rows, 2 * size),),
        run=silu_and_mul,
        expected=lambda x: plain(x.double()),
        work=Work(2 * num_rows * size * 2, num_rows * size * 2),
        peers={"torch": plain},
    )


KERNEL = Kernel(
    name="silu_and_mul",
    launched={"silu_and_mul_kernel": Limits(max_registers=128, max_shared_bytes=0)},  # no element meets another
    cases=each(check_shape, shape=[(1, 1), (7, 24), (3, 33), (0, 16), (2, 1025)], dtype=(torch.float32, torch.float16))
    | {
        "rows far apart": check_shape((5, 24), torch.float32, spare=13),
        "row of several tiles": check_shape((5, 24), torch.float32, tile_size=16),
        "large gates": check_large_gates,
        "far row": check_far_row,
    },
    on_gpu=each(check_shape, shape=[*product((1, 257, 4096), SIZES)], dtype=DTYPES),
    drawn=st.builds(
        check_shape,
        st.tuples(st.integers(1, 300), st.integers(1, 3000)),
        st.sampled_from(DTYPES),
        spare=st.integers(0, 9),
    ),
    compiled={
        f"{size}": Compilation(lambda dtype, _, size=size: launch_small_and_large(size, dtype)) for size in SIZES
    },
    refused=Refused(
        silu_and_mul,
        lambda: {"x": torch.empty(4, 8)},
        tuple(
            ({"x": x}, r"x must be \[T, 2 \* F\]")
            for x in (torch.empty(4), torch.empty(4, 7), torch.empty(8, 4).T, torch.empty(4, 8).double())
        ),
    ),
    steps={"": Steps(lambda size: silu_and_mul(meta(size, 6144)), met_at_start=True)},
    measured={"silu_and_mul": measured},
)
