"""Turning queries and keys by their positions' angles."""

import pytest
import torch

from benchmarks import arithmetic
from benchmarks.kernels.inputs import randn
from benchmarks.shapes import NUM_TOKENS, SHAPES


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def angles(index: int, num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [num_tokens, head_dim / 2] float32."""
    angle = 1000 * randn(index, num_tokens, head_dim // 2).float()
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_embedding(measure, shape, num_tokens):
    from nanovllm.kernels.rotary_embedding import rotary_embedding

    num_heads, num_kv_heads, head_dim = SHAPES[shape][:3]

    def make(index: int) -> tuple[torch.Tensor, ...]:
        qkv = randn(index, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        query, key, _ = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        return query, key, *angles(index, num_tokens, head_dim)

    def plain(query, key, cos, sin):
        return turn(query.float(), cos, sin).bfloat16(), turn(key.float(), cos, sin).bfloat16()

    measure(
        "rotary_embedding",
        f"{shape}, {num_tokens} tokens",
        make=make,
        run=rotary_embedding,
        expected=lambda query, key, cos, sin: (turn(query.double(), cos, sin), turn(key.double(), cos, sin)),
        work=arithmetic.rotary_embedding(num_tokens, num_heads, num_kv_heads, head_dim),
        peers={"torch": plain},
    )
