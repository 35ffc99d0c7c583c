"""References of layers (norms, rotary embedding, experts, shards) against torch, complex numbers, loops and laws.

Everything runs in float64; sums of fewer than 100 terms of size 1 agree to 1e-12 in any order.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.linear import linear
from reference.moe import moe
from reference.rms_norm import rms_norm
from reference.rotary_embedding import inverse_frequencies, rotary_embedding
from reference.silu_and_mul import silu_and_mul
from reference.tensor_parallel import row_parallel_linear, vocab_parallel_embedding
from tests.support.comparing import assert_close
from tests.support.tiny_models import ROPE


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close("reference: layers against loops, PyTorch and laws", actual, expected, rtol=0, atol=1e-12)


def test_linear_equals_torch_with_and_without_a_bias() -> None:
    x, weight, bias = random(5, 7), random(3, 7, seed=1), random(3, seed=2)
    close(linear(x, weight), F.linear(x, weight))
    close(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_equals_torch_with_and_without_a_residual(eps: float) -> None:
    x, residual, weight = random(5, 7), random(5, 7, seed=1), random(7, seed=2)
    close(torch.as_tensor(rms_norm(x, weight, eps)), F.rms_norm(x, (7,), weight, eps))
    y, total = rms_norm(x, weight, eps, residual)
    close(y, F.rms_norm(x + residual, (7,), weight, eps))
    close(total, x + residual)


def test_silu_and_mul_equals_torch() -> None:
    x = random(5, 14) * 10
    close(silu_and_mul(x), F.silu(x[:, :7]) * x[:, 7:])


@pytest.mark.parametrize("scaling", [None, ROPE["linear"], ROPE["llama3"], ROPE["yarn"]])
def test_rotation_is_multiplication_by_a_complex_number(scaling: dict | None) -> None:
    x, positions = random(4, 3, 8), torch.tensor([0, 1, 17, 300])
    inv_freq, a = inverse_frequencies(8, 10000.0, scaling or {})
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(
        torch.full((4, 1, 4), a, dtype=torch.float64), (positions[:, None] * inv_freq)[:, None]
    )
    close(rotary_embedding(positions, x, 10000.0, scaling), torch.cat([turned.real, turned.imag], dim=-1))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_moe_equals_a_loop_over_tokens_and_their_experts(top_k: int, norm_topk_prob: bool) -> None:
    x, router = random(6, 4, seed=1), random(5, 4, seed=2)
    gate_up, down = random(5, 14, 4, seed=3), random(5, 4, 7, seed=4)
    expected = []
    for token in x:
        exps = [math.exp(float(router[n] @ token)) for n in range(5)]
        best = sorted(range(5), key=lambda n: -exps[n])[:top_k]
        total = sum(exps[n] for n in best) if norm_topk_prob else sum(exps)
        expert = [down[n] @ (F.silu(gate_up[n, :7] @ token) * (gate_up[n, 7:] @ token)) for n in best]
        expected.append(sum((exps[n] / total * y for n, y in zip(best, expert, strict=True)), torch.zeros(4)))
    close(moe(x, router, gate_up, down, top_k, norm_topk_prob), torch.stack(expected))


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
