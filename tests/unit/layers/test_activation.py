"""torch_ops.silu_and_mul against the reference in float64; torch's silu is within a few units in the last place."""

import pytest
import torch

from nanovllm.layers import torch_ops
from reference.silu_and_mul import silu_and_mul
from tests.support.comparing import assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_silu_and_mul_equals_the_reference(dtype: torch.dtype) -> None:
    x = (4 * torch.randn(5, 32)).to(dtype)
    actual = torch_ops.silu_and_mul(x)
    assert (actual.dtype, actual.shape) == (dtype, (5, 16))
    rtol = 4 * torch.finfo(dtype).eps  # silu is rounded to the dtype, then the product
    atol = torch.finfo(dtype).smallest_normal
    assert_close("layers: activation against the reference", actual.double(), silu_and_mul(x.double()), rtol, atol)
