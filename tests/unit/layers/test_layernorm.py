"""RMSNorm against reference.rms_norm. Both round once to the dtype before the product with the weight and once after;
1 / sqrt may differ from sqrt in the last bit of the wide type, which moves a rounding by at most one unit each.
"""

import pytest
import torch

from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parameter import ShapeError
from reference.rms_norm import rms_norm
from tests.support import comparing
from tests.support.kernels.accuracy import assert_rounded_alike

E, EPS = 48, 1e-5
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def norm_and_weight(dtype):
    layer = RMSNorm(E, EPS).to(dtype)
    weight = (1 + 0.3 * torch.randn(E)).to(dtype)
    layer.weight.weight_loader(layer.weight, weight)
    return layer, weight


def assert_close(actual, expected):
    rtol = 4 * torch.finfo(expected.dtype).eps
    comparing.assert_close("layers: RMSNorm against the reference", actual, expected, rtol, atol=0)


@DTYPES
@pytest.mark.parametrize("shape", [(7, E), (3, 4, E)], ids=["tokens", "heads"])
def test_rms_norm_equals_the_reference(dtype, shape):
    layer, weight = norm_and_weight(dtype)
    x = (3 * torch.randn(shape)).to(dtype)
    assert_close(layer(x), rms_norm(x, weight, EPS))


@DTYPES
def test_residual_is_added_first_and_the_sum_returned(dtype):
    layer, weight = norm_and_weight(dtype)
    x, residual = torch.randn(7, E).to(dtype), torch.randn(7, E).to(dtype)
    normed, stream = layer(x, residual)
    expected_normed, expected_stream = rms_norm(x, weight, EPS, residual)
    assert torch.equal(stream, expected_stream)
    assert_close(normed, expected_normed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_before_the_weight_as_in_training(dtype):
    """And not after it: then more than one element in ten would differ."""
    layer, weight = norm_and_weight(dtype)
    x = (3 * torch.randn(50, E)).to(dtype)
    assert_rounded_alike(layer(x), rms_norm(x, weight, EPS))


@DTYPES
def test_inputs_stay_as_they_were(dtype):
    """D50"""
    layer, _ = norm_and_weight(dtype)
    x, residual = torch.randn(7, E).to(dtype), torch.randn(7, E).to(dtype)
    x_before, residual_before = x.clone(), residual.clone()
    layer(x)
    layer(x, residual)
    assert torch.equal(x, x_before)
    assert torch.equal(residual, residual_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_squares_are_summed_in_float32(dtype):
    """300 ** 2 is beyond float16, and a sum of 48 equal squares in bfloat16 stops growing: neither may matter."""
    layer = RMSNorm(E, 0.0).to(dtype)
    layer.weight.fill_(1.0)
    assert torch.equal(layer(torch.full((1, E), 300.0, dtype=dtype)), torch.ones(1, E, dtype=dtype))


def test_weight_of_another_shape_is_refused():
    """D62"""
    weight = RMSNorm(E).weight
    with pytest.raises(ShapeError, match=rf"expected shape \[{E}\], got \[1\]"):
        weight.weight_loader(weight, torch.ones(1))
