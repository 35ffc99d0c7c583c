"""Cases of rms_norm and add_rms_norm against reference.rms_norm. D50, D52"""

from functools import partial
from itertools import product

import torch
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from reference.rms_norm import rms_norm as reference_rms_norm
from tests.support.kernels.accuracy import assert_like_reference, assert_rounded_alike
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

rms_norm, add_rms_norm = lazy("rms_norm.rms_norm"), lazy("rms_norm.add_rms_norm")
EPS = 1e-5
HIDDEN_SIZES = (896, 1024, 2048, 4096)  # qwen2.5-0.5b, qwen3-0.6b, qwen3-30b-a3b, llama-3-8b


def make(guards: Guards, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """layout: "dense"; "packed": some heads of a packed qkv, so the tokens are not adjacent in memory; "heads apart": a
    part of every other head of a wider tensor, so the heads are not adjacent either."""
    if layout == "dense":
        return guards.randn(*shape, std=3, dtype=dtype)
    tokens, heads, size = shape
    if layout == "packed":
        return guards.randn(tokens, heads + 5, size, dtype=dtype)[:, 3:-2]
    return guards.randn(tokens, 2 * heads, size + 6, dtype=dtype)[:, 1::2, 6:]


@case
def check_norm(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, layouts: tuple[str, ...] = ("dense",), **tiles: int
) -> None:
    """layouts: that of x, and with a residual that of the residual. x + residual must be torch's sum, bit for bit; the
    reference normalises this rounded sum."""
    guards = Guards(device)
    inputs = [make(guards, layout, shape, dtype) for layout in layouts]
    weight = guards.randn(shape[-1], mean=1, std=0.3, dtype=dtype)
    with guards:
        if len(inputs) == 1:
            normed, total = rms_norm(*inputs, weight, EPS, **tiles), inputs[0]
        else:
            normed, total = add_rms_norm(*inputs, weight, EPS, **tiles)
            assert torch.equal(total, sum(inputs))
    axes = ("token", "element") if len(shape) == 2 else ("token", "head", "element")
    assert_like_reference("rms_norm", normed, reference_rms_norm, (total, weight, EPS), axes)


def check_rounding(device: str) -> None:
    """Rounds the sum before the norm, and the normalised value before the product with weight, as in training."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(20, 64, generator=generator).to(device, torch.float16) for _ in range(2))
    weight = (1 + 0.3 * torch.randn(64, generator=generator)).to(device, torch.float16)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    wide = total.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(dim=1, keepdim=True) + EPS)).half() * weight
    assert_rounded_alike(normed, expected)


def check_large_squares(device: str) -> None:
    """300 ** 2 exceeds the range of float16, so the squares must be summed in float32."""
    x = torch.full((1, 48), 300.0, dtype=torch.float16, device=device)
    assert torch.equal(rms_norm(x, torch.ones_like(x[0]), 0.0), torch.ones_like(x))


def check_far_row(device: str) -> None:
    """D52: the last row begins at element 2**31 of its storage of 4 GiB, of which a CPU allocates three pages only."""
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.arange(3)[:, None] + 1)
    normed, total = add_rms_norm(x, x, torch.ones(64, dtype=torch.float16, device=device), 0.0)
    assert torch.equal(normed, torch.ones_like(normed))
    assert total[:, 0].tolist() == [2, 4, 6]


LAYOUTS = {"rms_norm": ("dense",), "add_rms_norm": ("dense", "dense")}
VIEWS = {"packed": ("packed",), "packed and heads apart": ("packed", "heads apart"), "heads apart": ("heads apart",)}
SHAPES = [(1, 1), (7, 48), (3, 64), (5, 3, 16), (2, 5, 33), (0, 16), (3, 0, 16), (3, 1024)]


def launch_both(x: torch.Tensor, residual: torch.Tensor) -> None:
    weight = meta(x.shape[-1], dtype=x.dtype)
    rms_norm(x, weight)
    add_rms_norm(residual, residual, weight)


def measured(shape: Shape, num_tokens: int) -> Measured:
    size = shape.hidden_size
    return Measured(
        make=lambda index: (randn(index, num_tokens, size), randn(index + 1, size)),
        run=lambda x, weight: rms_norm(x, weight, EPS),
        expected=lambda x, weight: functional.rms_norm(x.double(), weight.shape, weight.double(), EPS),
        work=Work(num_tokens * size * 2, num_tokens * size * 2),
        peers={"torch": lambda x, weight: functional.rms_norm(x, weight.shape, weight, EPS)},
    )


def measured_with_residual(shape: Shape, num_tokens: int) -> Measured:
    size, norm = shape.hidden_size, functional.rms_norm

    def plain(x, residual, weight, dtype=torch.bfloat16):
        total = x + residual
        return norm(total.to(dtype), weight.shape, weight.to(dtype), EPS), total

    return Measured(
        make=lambda index: (*randn(index, 2, num_tokens, size), randn(index + 1, size)),
        run=lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        expected=partial(plain, dtype=torch.float64),
        work=Work(2 * num_tokens * size * 2, 2 * num_tokens * size * 2),
        peers={"torch": plain},
    )


KERNEL = Kernel(
    name="rms_norm",
    launched={"rms_norm_kernel": Limits(128, 1024)},  # shared memory: a partial sum for each warp and row
    cases=each(check_norm, layouts=LAYOUTS, shape=SHAPES, dtype=(torch.float32, torch.float16))
    | each(check_norm, layouts=VIEWS, shape=[(5, 2, 24)], dtype=(torch.float32, torch.float16))
    | {f"several rows a program, {rows}": check_norm((7, 48), torch.float32, rows=rows) for rows in (2, 8)}
    | {"rounding": check_rounding, "large squares": check_large_squares, "far row": check_far_row},
    on_gpu=each(check_norm, layouts=LAYOUTS, shape=[*product((1, 257, 16384), HIDDEN_SIZES)], dtype=DTYPES)
    | each(check_norm, layouts=VIEWS, shape=[(5, 2, 24)], dtype=(torch.bfloat16,)),
    drawn=st.builds(
        check_norm,
        st.tuples(st.integers(1, 300), st.sampled_from([1, 7, 64, 96, 128, 1000, 5000])),
        st.sampled_from(DTYPES),
        st.sampled_from(list(LAYOUTS.values())),
    ),
    compiled={
        f"{num_tokens} x {size}": Compilation(
            lambda dtype, _, n=num_tokens, size=size: launch_both(
                meta(n // 10, 10, size, dtype=dtype)[:, 2:], meta(n, size, dtype=dtype)
            )
        )
        for num_tokens in (100, 10000)
        for size in (128, *HIDDEN_SIZES)
    },
    refused=Refused(
        add_rms_norm,
        lambda: {"x": torch.empty(4, 8), "residual": torch.empty(4, 8), "weight": torch.empty(8)},
        (
            ({"x": torch.empty(8)}, "x must be"),
            ({"x": torch.empty(8, 4).T}, "x must be"),
            ({"x": torch.empty(4, 8, dtype=torch.float64)}, "x must be"),
            ({"weight": torch.empty(1)}, r"weight must be \[8\]"),
            ({"weight": torch.empty(8, dtype=torch.float16)}, r"weight must be \[8\]"),
            ({"residual": torch.empty(1, 8)}, r"residual must be \[4, 8\]"),
            ({"residual": torch.empty(4, 8, dtype=torch.float16)}, r"residual must be \[4, 8\]"),
        ),
    ),
    steps={"": Steps(lambda size: launch_both(meta(size, 1024), meta(size, 1024)), max_variants=2, met_at_start=True)},
    measured={"rms_norm": measured, "add_rms_norm": measured_with_residual},
)
