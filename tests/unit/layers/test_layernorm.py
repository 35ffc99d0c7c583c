"""RMSNorm in half precision, against reference.rms_norm. tests/e2e/test_hugging_face.py compares it in float32.

Both round once to the dtype before the product with the weight and once after; 1 / sqrt may differ from sqrt in the
last bit of the wide type, which moves a rounding by at most one unit each.
"""

import pytest
import torch

from nanovllm.layers.layernorm import RMSNorm
from reference.rms_norm import rms_norm
from tests.support.kernels.accuracy import assert_rounded_alike

E, EPS = 48, 1e-5
pytestmark = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def test_it_rounds_before_the_weight_as_in_training(dtype: torch.dtype) -> None:
    """And not after it: then more than one element in ten would differ."""
    layer = RMSNorm(E, EPS).to(dtype)
    weight = (1 + 0.3 * torch.randn(E)).to(dtype)
    layer.weight.weight_loader(layer.weight, weight)
    x = (3 * torch.randn(50, E)).to(dtype)
    assert_rounded_alike(layer(x), rms_norm(x, weight, EPS))


def test_squares_are_summed_in_float32(dtype: torch.dtype) -> None:
    """300 ** 2 is beyond float16, and a sum of 48 equal squares in bfloat16 stops growing: neither may matter."""
    layer = RMSNorm(E, 0.0).to(dtype)
    layer.weight.fill_(1.0)
    assert torch.equal(layer(torch.full((1, E), 300.0, dtype=dtype)), torch.ones(1, E, dtype=dtype))
