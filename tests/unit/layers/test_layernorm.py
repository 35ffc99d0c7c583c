"""RMSNorm against reference.rms_norm. Both round once to the dtype before the product with the weight and once after;
1 / sqrt may differ from sqrt in the last bit of the wide type, which moves a rounding by at most one unit each.
"""

import pytest
import torch

from nanovllm.layers.layernorm import RMSNorm
from reference.rms_norm import rms_norm
from tests.support import comparing
from tests.support.kernels.accuracy import assert_rounded_alike

E, EPS = 48, 1e-5
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def norm_and_weight(dtype: torch.dtype) -> tuple[RMSNorm, torch.Tensor]:
    layer = RMSNorm(E, EPS).to(dtype)
    weight = (1 + 0.3 * torch.randn(E)).to(dtype)
    layer.weight.weight_loader(layer.weight, weight)
    return layer, weight


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    rtol = 4 * torch.finfo(expected.dtype).eps
    comparing.assert_close("layers: RMSNorm against the reference", actual, expected, rtol, atol=0)


@DTYPES
@pytest.mark.parametrize("shape", [(7, E), (3, 4, E)], ids=["tokens", "heads"])
def test_rms_norm_equals_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """With a residual, that is added first, and the sum returned."""
    layer, weight = norm_and_weight(dtype)
    x, residual = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    assert_close(layer(x), rms_norm(x, weight, EPS))
    normed, stream = layer(x, residual)
    expected_normed, expected_stream = rms_norm(x, weight, EPS, residual)
    assert torch.equal(stream, expected_stream)
    assert_close(normed, expected_normed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_before_the_weight_as_in_training(dtype: torch.dtype) -> None:
    """And not after it, nor in the sum of the squares: then more than one element in ten would differ."""
    layer, weight = norm_and_weight(dtype)
    x = (3 * torch.randn(50, E)).to(dtype)
    assert_rounded_alike(layer(x), rms_norm(x, weight, EPS))
