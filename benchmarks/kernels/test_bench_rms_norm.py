"""RMSNorm of the hidden states, with and without the addition of the residual."""

import pytest
import torch
from torch.nn import functional

from benchmarks import arithmetic
from benchmarks.kernels.inputs import randn
from benchmarks.shapes import NUM_TOKENS, SHAPES

EPS = 1e-6


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x.double(), weight.shape, weight.double(), EPS)


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, weight.shape, weight, EPS)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(measure, shape, num_tokens):
    from nanovllm.kernels.rms_norm import rms_norm

    size = SHAPES[shape].hidden_size
    measure(
        "rms_norm",
        f"{shape}, {num_tokens} tokens",
        make=lambda index: (randn(index, num_tokens, size), randn(index + 1, size)),
        run=lambda x, weight: rms_norm(x, weight, EPS),
        expected=exact,
        work=arithmetic.rms_norm(num_tokens, size),
        peers={"torch": plain},
    )


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(measure, shape, num_tokens):
    from nanovllm.kernels.rms_norm import add_rms_norm

    size = SHAPES[shape].hidden_size

    def expected(x, residual, weight):
        total = x + residual
        return exact(total, weight), total

    def plain_sum(x, residual, weight):
        total = x + residual
        return plain(total, weight), total

    measure(
        "add_rms_norm",
        f"{shape}, {num_tokens} tokens",
        make=lambda index: (*randn(index, 2, num_tokens, size), randn(index + 1, size)),
        run=lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        expected=expected,
        work=arithmetic.add_rms_norm(num_tokens, size),
        peers={"torch": plain_sum},
    )
