"""Cases of rms_norm and add_rms_norm against reference.rms_norm. D50, D52"""

from functools import partial

import torch
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from reference.rms_norm import rms_norm as reference_rms_norm
from tests.support.kernels.accuracy import assert_rounded_alike, assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

rms_norm, add_rms_norm = lazy("rms_norm.rms_norm"), lazy("rms_norm.add_rms_norm")
EPS = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HIDDEN_SIZES = (896, 1024, 2048, 4096)  # qwen2.5-0.5b, qwen3-0.6b, qwen3-30b-a3b, llama-3-8b


def assert_normed(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    plain, exact = reference_rms_norm(x, weight, EPS), reference_rms_norm(x.double(), weight.double(), EPS)
    axes = ("token", "element") if x.ndim == 2 else ("token", "head", "element")
    assert_within_twice_the_error_of_plain_torch("rms_norm", actual, plain, exact, axes)


def check_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str, **tiles: int) -> None:
    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    x = guards.read((3 * torch.randn(shape, generator=generator)).to(dtype))
    weight = guards.read((1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype))
    with guards:
        normed = rms_norm(x, weight, EPS, **tiles)
    guards.assert_intact()
    assert_normed(normed, x, weight)


def check_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str, **tiles: int) -> None:
    """The sum is what torch gives, to the bit, and what is normalised is that sum, rounded."""
    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    x, residual = (guards.read(torch.randn(shape, generator=generator).to(dtype)) for _ in range(2))
    weight = guards.read((1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype))
    with guards:
        normed, total = add_rms_norm(x, residual, weight, EPS, **tiles)
    guards.assert_intact()
    assert torch.equal(total, x + residual)
    assert_normed(normed, total, weight)


def check_views(dtype: torch.dtype, device: str) -> None:
    """x: the key heads of a packed qkv; residual: rows that stand further apart than they are long."""
    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    _, key, _ = guards.read(torch.randn(5, 7, 24, generator=generator).to(dtype)).split([3, 2, 2], dim=1)
    weight = guards.read(torch.randn(24, generator=generator).to(dtype))
    wide = guards.read(torch.randn(5, 3, 30, generator=generator).to(dtype))
    with guards:
        normed = rms_norm(key, weight, EPS)
        normed_sum, total = add_rms_norm(key, wide[:, 1:, 6:], weight, EPS)
    guards.assert_intact()
    assert_normed(normed, key, weight)
    assert_normed(normed_sum, total, weight)
    assert torch.equal(total, key + wide[:, 1:, 6:])


def check_heads_apart(device: str) -> None:
    """Every other head of a wider tensor."""
    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    x = guards.read(torch.randn(3, 8, 16, generator=generator))[:, 1::2]
    weight = guards.read(torch.randn(16, generator=generator))
    with guards:
        normed = rms_norm(x, weight, EPS)
    guards.assert_intact()
    assert_normed(normed, x, weight)


def check_rounding(device: str) -> None:
    """The sum is rounded before it is normalised, and what is normalised before it is multiplied, as in training."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(20, 64, generator=generator).to(device, torch.float16) for _ in range(2))
    weight = (1 + 0.3 * torch.randn(64, generator=generator)).to(device, torch.float16)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    wide = total.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(dim=1, keepdim=True) + EPS)).half() * weight
    assert_rounded_alike(normed, expected)


def check_large_squares(device: str) -> None:
    """300 ** 2 is beyond float16: squares are summed in float32."""
    x = torch.full((1, 48), 300.0, dtype=torch.float16, device=device)
    assert torch.equal(rms_norm(x, torch.ones_like(x[0]), 0.0), torch.ones_like(x))


def check_far_row(device: str) -> None:
    """D52: rows whose elements lie beyond 2**31, in a view of 4 GiB, of which a CPU touches three pages."""
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.arange(3)[:, None] + 1)
    normed, total = add_rms_norm(x, x, torch.ones(64, dtype=torch.float16, device=device), 0.0)
    assert torch.equal(normed, torch.ones_like(normed))
    assert total[:, 0].tolist() == [2, 4, 6]


NORMS = {"rms_norm": check_rms_norm, "add_rms_norm": check_add_rms_norm}
SHAPES = [(1, 1), (7, 48), (3, 64), (5, 3, 16), (2, 5, 33), (0, 16), (3, 0, 16), (3, 1024)]


def named(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


def cases_of(shapes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, ...]) -> dict[str, partial]:
    return {
        f"{name} {named(shape, dtype)}": partial(check, shape, dtype)
        for name, check in NORMS.items()
        for shape in shapes
        for dtype in dtypes
    }


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
    launched={"rms_norm_kernel": Limits(128, 1024)},  # a partial sum a warp and row is shared
    cases=cases_of(SHAPES, (torch.float32, torch.float16))
    | {f"several rows a program, {rows}": partial(check_rms_norm, (7, 48), torch.float32, rows=rows) for rows in (2, 8)}
    | {f"views {str(dtype)[6:]}": partial(check_views, dtype) for dtype in (torch.float32, torch.float16)}
    | {"heads apart": check_heads_apart, "rounding": check_rounding}
    | {"large squares": check_large_squares, "far row": check_far_row},
    on_gpu=cases_of([(num_tokens, size) for num_tokens in (1, 257, 16384) for size in HIDDEN_SIZES], DTYPES)
    | {"views bfloat16": partial(check_views, torch.bfloat16)},
    drawn=st.builds(
        lambda check, num_tokens, size, dtype: partial(check, (num_tokens, size), dtype),
        st.sampled_from(list(NORMS.values())),
        st.integers(1, 300),
        st.sampled_from([1, 7, 64, 96, 128, 1000, 5000]),
        st.sampled_from(DTYPES),
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
    refused=Refusals(
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
