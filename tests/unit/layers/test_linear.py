"""Linear layers: the ranks' shares against the dense layer of reference.tensor_parallel, in float64.

models/test_models.py has the packed ones (q, k and v; gate and up), whose ranks together give what one rank gives; here
one matrix is packed alone.

A share computes the same dot products, or parts of them, so float64 leaves rounding in the order of 1e-15 of values in
the order of 10; 1e-12 is far above that and far below any wrong row.
"""

import pytest
import torch

from nanovllm.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from reference.tensor_parallel import column_parallel_linear, row_parallel_linear
from tests.support.comparing import assert_close
from tests.support.parallel_ranks import partial_ranks

T, E = 5, 16
SIZES = pytest.mark.parametrize("size", [1, 2, 4])
BIAS = pytest.mark.parametrize("has_bias", [False, True])


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def load(layer, weight, bias, *shard_id):
    layer.weight.weight_loader(layer.weight, weight, *shard_id)
    if bias is not None:
        layer.bias.weight_loader(layer.bias, bias, *shard_id)
    return layer


def assert_equal(actual, expected):
    assert_close("layers: linear against the reference", actual, expected, rtol=0, atol=1e-12)


@SIZES
@BIAS
def test_column_parallel_outputs_side_by_side_are_the_dense_layer(size, has_bias):
    """And a replicated layer is the dense layer itself."""
    x, weight, bias = torch.randn(T, E), torch.randn(12, E), torch.randn(12) if has_bias else None
    layers = [MergedColumnParallelLinear(E, [12], has_bias, rank) for rank in partial_ranks(size)]
    outputs = [load(layer, weight, bias, 0)(x) for layer in layers]
    dense = column_parallel_linear(x, weight, bias, 1)[0]
    assert_equal(torch.cat(outputs, dim=-1), dense)
    assert_equal(load(ReplicatedLinear(E, 12, has_bias), weight, bias)(x), dense)


@SIZES
@BIAS
def test_row_parallel_outputs_summed_are_the_dense_layer(size, has_bias):
    """D38: the bias is in the sum once."""
    x, weight, bias = torch.randn(T, E), torch.randn(6, E), torch.randn(6) if has_bias else None
    inputs = list(x.chunk(size, dim=-1))
    layers = [load(RowParallelLinear(E, 6, has_bias, rank), weight, bias) for rank in partial_ranks(size)]
    outputs = [layer(part) for layer, part in zip(layers, inputs, strict=True)]
    assert_equal(torch.stack(outputs).sum(0), row_parallel_linear(inputs, weight, bias))
