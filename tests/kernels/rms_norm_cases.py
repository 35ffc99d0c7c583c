"""Cases of rms_norm and add_rms_norm for a device: see tests/support/kernels/interpreting.py."""

from functools import partial

import torch

from reference.rms_norm import rms_norm as reference_rms_norm
from tests.support.kernels.accuracy import assert_rounded_alike, assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.interpreting import Guards

EPS = 1e-5


def check_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str, **tiles: int) -> None:
    from nanovllm.kernels.rms_norm import rms_norm

    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    x = guards.read((3 * torch.randn(shape, generator=generator)).to(dtype))
    weight = guards.read((1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype))
    with guards:
        normed = rms_norm(x, weight, EPS, **tiles)
    guards.assert_intact()
    exact = reference_rms_norm(x.double(), weight.double(), EPS)
    assert_within_twice_the_error_of_plain_torch("rms_norm", normed, reference_rms_norm(x, weight, EPS), exact)


def check_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str, **tiles: int) -> None:
    """The sum is what torch gives, to the bit, and what is normalised is that sum, rounded."""
    from nanovllm.kernels.rms_norm import add_rms_norm

    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    x, residual = (guards.read(torch.randn(shape, generator=generator).to(dtype)) for _ in range(2))
    weight = guards.read((1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype))
    with guards:
        normed, total = add_rms_norm(x, residual, weight, EPS, **tiles)
    guards.assert_intact()
    assert torch.equal(total, x + residual)
    plain = reference_rms_norm(total, weight, EPS)
    exact = reference_rms_norm(total.double(), weight.double(), EPS)
    assert_within_twice_the_error_of_plain_torch("rms_norm", normed, plain, exact)


def check_views(dtype: torch.dtype, device: str) -> None:
    """x: the key heads of a packed qkv; residual: rows that stand further apart than they are long."""
    from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm

    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    _, key, _ = guards.read(torch.randn(5, 7, 24, generator=generator).to(dtype)).split([3, 2, 2], dim=1)
    weight = guards.read(torch.randn(24, generator=generator).to(dtype))
    wide = guards.read(torch.randn(5, 3, 30, generator=generator).to(dtype))
    with guards:
        normed = rms_norm(key, weight, EPS)
        normed_sum, total = add_rms_norm(key, wide[:, 1:, 6:], weight, EPS)
    guards.assert_intact()
    for actual, x in ((normed, key), (normed_sum, total)):
        exact = reference_rms_norm(x.double(), weight.double(), EPS)
        assert_within_twice_the_error_of_plain_torch("rms_norm", actual, reference_rms_norm(x, weight, EPS), exact)
    assert torch.equal(total, key + wide[:, 1:, 6:])


def check_heads_apart(device: str) -> None:
    """Every other head of a wider tensor."""
    from nanovllm.kernels.rms_norm import rms_norm

    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    x = guards.read(torch.randn(3, 8, 16, generator=generator))[:, 1::2]
    weight = guards.read(torch.randn(16, generator=generator))
    with guards:
        normed = rms_norm(x, weight, EPS)
    guards.assert_intact()
    exact = reference_rms_norm(x.double(), weight.double(), EPS)
    assert_within_twice_the_error_of_plain_torch("rms_norm", normed, reference_rms_norm(x, weight, EPS), exact)


def check_rounding(device: str) -> None:
    """The sum is rounded before it is normalised, and what is normalised before it is multiplied, as in training."""
    from nanovllm.kernels.rms_norm import add_rms_norm

    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(20, 64, generator=generator).to(device, torch.float16) for _ in range(2))
    weight = (1 + 0.3 * torch.randn(64, generator=generator)).to(device, torch.float16)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    wide = total.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(dim=1, keepdim=True) + EPS)).half() * weight
    assert_rounded_alike(normed, expected)


def check_large_squares(device: str) -> None:
    """300 ** 2 is beyond float16: squares are summed in float32."""
    from nanovllm.kernels.rms_norm import rms_norm

    x = torch.full((1, 48), 300.0, dtype=torch.float16, device=device)
    assert torch.equal(rms_norm(x, torch.ones_like(x[0]), 0.0), torch.ones_like(x))


def check_far_row(device: str) -> None:
    """D52: rows whose elements lie beyond 2**31, in a view of 4 GiB, of which a CPU touches three pages."""
    from nanovllm.kernels.rms_norm import add_rms_norm

    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.arange(3)[:, None] + 1)
    normed, total = add_rms_norm(x, x, torch.ones(64, dtype=torch.float16, device=device), 0.0)
    assert torch.equal(normed, torch.ones_like(normed))
    assert total[:, 0].tolist() == [2, 4, 6]


SHAPES = [(1, 1), (7, 48), (3, 64), (5, 3, 16), (2, 5, 33), (0, 16), (3, 0, 16), (3, 1024)]
CHECKS = {
    f"{name} {list(shape)} {dtype}": partial(check, shape, dtype)
    for name, check in {"rms_norm": check_rms_norm, "add_rms_norm": check_add_rms_norm}.items()
    for shape in SHAPES
    for dtype in (torch.float32, torch.float16)
}
CHECKS |= {
    f"several rows a program, {rows}": partial(check_rms_norm, (7, 48), torch.float32, rows=rows) for rows in (2, 8)
}
CHECKS |= {f"views {dtype}": partial(check_views, dtype) for dtype in (torch.float32, torch.float16)}
CHECKS |= {"heads apart": check_heads_apart, "rounding": check_rounding}
CHECKS |= {"large squares": check_large_squares, "far row": check_far_row}
