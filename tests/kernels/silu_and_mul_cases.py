"""Cases of silu_and_mul for a device: see tests/support/kernels/interpreting.py."""

from functools import partial

import torch

from reference.silu_and_mul import silu_and_mul as reference_silu_and_mul
from tests.support.kernels.accuracy import assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.interpreting import Guards


def check_shape(num_tokens: int, size: int, dtype: torch.dtype, device: str, stride: int | None = None, **tiles: int):
    """x: rows of 2 * size, `stride` apart."""
    from nanovllm.kernels.silu_and_mul import silu_and_mul

    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    x = guards.read((4 * torch.randn(num_tokens, stride or 2 * size, generator=generator)).to(dtype))[:, : 2 * size]
    with guards:
        y = silu_and_mul(x, **tiles)
    guards.assert_intact()
    plain, exact = reference_silu_and_mul(x), reference_silu_and_mul(x.double())
    assert_within_twice_the_error_of_plain_torch("silu_and_mul", y, plain, exact)


def check_large_gates(device: str) -> None:
    """exp(-gate) is beyond float32 on one side and 0 on the other: silu is 0 and the gate itself, never NaN."""
    from nanovllm.kernels.silu_and_mul import silu_and_mul

    x = torch.tensor([[-1000.0, 1000.0, 3.0, 2.0]], device=device)
    assert silu_and_mul(x).tolist() == [[0.0, 2000.0]]


def check_far_row(device: str) -> None:
    """D52: rows whose elements lie beyond 2**31, in a view of 4 GiB, of which a CPU touches three pages."""
    from nanovllm.kernels.silu_and_mul import silu_and_mul

    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.arange(3)[:, None] + 32)  # silu(32) is 32 in float16
    assert silu_and_mul(x)[:, -1].tolist() == [32**2, 33**2, 34**2]


SHAPES = [(1, 1), (7, 24), (3, 33), (0, 16), (2, 1025)]
CHECKS = {
    f"{num_tokens} x {size} {dtype}": partial(check_shape, num_tokens, size, dtype)
    for num_tokens, size in SHAPES
    for dtype in (torch.float32, torch.float16)
}
CHECKS |= {
    "rows far apart": partial(check_shape, 5, 24, torch.float32, stride=61),
    "row of several tiles": partial(check_shape, 5, 24, torch.float32, tile_size=16),
    "large gates": check_large_gates,
    "far row": check_far_row,
}
