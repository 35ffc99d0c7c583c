"""Linear layers: the ranks' shares against the dense layer of reference.tensor_parallel, in float64.

A share computes the same dot products, or parts of them, so float64 leaves rounding in the order of 1e-15 of values in
the order of 10; 1e-12 is far above that and far below any wrong row.
"""

import pytest
import torch

from nanovllm.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from reference.tensor_parallel import column_parallel_linear, row_parallel_linear
from tests.support.comparing import assert_close
from tests.support.parallel_ranks import partial_ranks

T, E, D = 5, 16, 4
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
    outputs = [load(ColumnParallelLinear(E, 12, has_bias, rank), weight, bias)(x) for rank in partial_ranks(size)]
    dense = column_parallel_linear(x, weight, bias, 1)[0]
    assert_equal(torch.cat(outputs, dim=-1), dense)
    assert_equal(load(ReplicatedLinear(E, 12, has_bias), weight, bias)(x), dense)


@SIZES
@BIAS
def test_merged_column_parallel_rank_has_its_share_of_each_matrix(size, has_bias):
    x, sizes = torch.randn(T, E), [8, 4]
    weights = [torch.randn(rows, E) for rows in sizes]
    biases = [torch.randn(rows) if has_bias else None for rows in sizes]
    per_matrix = [column_parallel_linear(x, w, b, size) for w, b in zip(weights, biases, strict=True)]
    for rank in partial_ranks(size):
        layer = MergedColumnParallelLinear(E, sizes, has_bias, rank)
        for shard_id in (1, 0):  # whatever the order of the tensors
            load(layer, weights[shard_id], biases[shard_id], shard_id)
        assert_equal(layer(x), torch.cat([outputs[rank.rank] for outputs in per_matrix], dim=-1))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (4, 1), (12, 4)])
@SIZES
@BIAS
def test_qkv_rank_has_its_query_heads_and_the_kv_heads_that_they_read(num_heads, num_kv_heads, size, has_bias):
    """D36: where ranks outnumber kv heads, heads are held by several ranks."""
    x = torch.randn(T, E)
    rows = {"q": num_heads * D, "k": num_kv_heads * D, "v": num_kv_heads * D}
    weights = {name: torch.randn(n, E) for name, n in rows.items()}
    biases = {name: torch.randn(n) if has_bias else None for name, n in rows.items()}
    dense = {name: column_parallel_linear(x, weights[name], biases[name], 1)[0].view(T, -1, D) for name in "qkv"}
    for rank in partial_ranks(size):
        layer = QKVParallelLinear(E, D, num_heads, num_kv_heads, has_bias, rank)
        for shard_id in "vkq":
            load(layer, weights[shard_id], biases[shard_id], shard_id)
        first_head = rank.rank * num_heads // size
        q_heads = range(first_head, first_head + num_heads // size)
        kv_heads = sorted({head // (num_heads // num_kv_heads) for head in q_heads})
        expected = [dense["q"][:, list(q_heads)], dense["k"][:, kv_heads], dense["v"][:, kv_heads]]
        assert (layer.num_heads, layer.num_kv_heads) == (len(q_heads), len(kv_heads))
        assert_equal(layer(x), torch.cat([heads.flatten(1) for heads in expected], dim=-1))


@SIZES
@BIAS
def test_row_parallel_outputs_summed_are_the_dense_layer(size, has_bias):
    """D38: the bias is in the sum once."""
    x, weight, bias = torch.randn(T, E), torch.randn(6, E), torch.randn(6) if has_bias else None
    inputs = list(x.chunk(size, dim=-1))
    layers = [load(RowParallelLinear(E, 6, has_bias, rank), weight, bias) for rank in partial_ranks(size)]
    outputs = [layer(part) for layer, part in zip(layers, inputs, strict=True)]
    assert_equal(torch.stack(outputs).sum(0), row_parallel_linear(inputs, weight, bias))
