"""References of layers (norms, rotary embedding, experts, shards) against torch, complex numbers, loops and laws.

Everything runs in float64; sums of fewer than 100 terms of size 1 agree to 1e-12 in any order.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.rms_norm import rms_norm
from reference.tensor_parallel import column_parallel_linear, row_parallel_linear, vocab_parallel_embedding
from tests.support.comparing import assert_close


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close("reference: layers against loops, PyTorch and laws", actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_equals_torch_with_and_without_a_residual(eps: float) -> None:
    x, residual, weight = random(5, 7), random(5, 7, seed=1), random(7, seed=2)
    close(torch.as_tensor(rms_norm(x, weight, eps)), F.rms_norm(x, (7,), weight, eps))
    y, total = rms_norm(x, weight, eps, residual)
    close(y, F.rms_norm(x + residual, (7,), weight, eps))
    close(total, x + residual)


def test_rms_norm_of_bfloat16_sums_its_squares_in_float32() -> None:
    """So it is rounded once, at the end: off by at most half a unit in the last of 8 bits, 2**-8 of the value, and a
    little for float32. A root mean square and a quotient rounded in turn would be off by up to twice that."""
    x = random(4, 300).bfloat16()
    y = torch.as_tensor(rms_norm(x, torch.ones(300, dtype=torch.bfloat16), eps=0.0))
    torch.testing.assert_close(y.double(), F.rms_norm(x.double(), (300,)), rtol=2**-8 + 2**-20, atol=0)


@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_column_parallel_outputs_side_by_side_are_the_whole(tp_size: int, with_bias: bool) -> None:
    x, weight = random(3, 5), random(8, 5, seed=1)
    bias = random(8, seed=2) if with_bias else None
    ranks = column_parallel_linear(x, weight, bias, tp_size)
    assert [rank.shape for rank in ranks] == [(3, 8 // tp_size)] * tp_size
    close(torch.cat(ranks, dim=1), F.linear(x, weight, bias))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_row_parallel_outputs_summed_are_the_whole(tp_size: int, with_bias: bool) -> None:
    """D38: with a bias that is added once, whatever the number of ranks."""
    x, weight = random(3, 8), random(5, 8, seed=1)
    bias = random(5, seed=2) if with_bias else None
    close(row_parallel_linear(list(x.chunk(tp_size, dim=1)), weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_vocab_parallel_embedding_is_a_row_lookup(tp_size: int) -> None:
    """D39: every rank masks what it does not hold, so each row is counted once."""
    weight, token_ids = random(8, 3), torch.tensor([7, 0, 3, 4, 4])
    assert torch.equal(vocab_parallel_embedding(token_ids, weight, tp_size), weight[token_ids])
