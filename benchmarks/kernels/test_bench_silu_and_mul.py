"""The activation between the two matrices of the feed-forward network."""

import pytest
from torch.nn import functional

from benchmarks import arithmetic
from benchmarks.kernels.inputs import randn
from benchmarks.shapes import NUM_TOKENS, SHAPES


def plain(x):
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_and_mul(measure, shape, num_tokens):
    from nanovllm.kernels.silu_and_mul import silu_and_mul

    num_rows = num_tokens * max(1, SHAPES[shape].top_k)  # a row for each expert that a token goes to
    size = SHAPES[shape].intermediate_size
    measure(
        "silu_and_mul",
        f"{shape}, {num_tokens} tokens",
        make=lambda index: (randn(index, num_rows, 2 * size),),
        run=silu_and_mul,
        expected=lambda x: plain(x.double()),
        work=arithmetic.silu_and_mul(num_rows, size),
        peers={"torch": plain},
    )
