"""What is measured of rotary_embedding."""

import torch

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from tests.support.kernels.registry import lazy

rotary_embedding = lazy("rotary_embedding.rotary_embedding")


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def angles(index: int, num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [num_tokens, head_dim / 2] float32."""
    angle = 1000 * randn(index, num_tokens, head_dim // 2).float()
    return angle.cos(), angle.sin()


def measured(shape: Shape, num_tokens: int) -> Measured:
    num_heads, num_kv_heads, head_dim = shape[:3]
    num_bytes = num_tokens * (num_heads + num_kv_heads) * head_dim * 2

    def make(index: int) -> tuple[torch.Tensor, ...]:
        qkv = randn(index, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        query, key, _ = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        return query, key, *angles(index, num_tokens, head_dim)

    return Measured(
        make=make,
        run=rotary_embedding,
        expected=lambda query, key, cos, sin: (turn(query.double(), cos, sin), turn(key.double(), cos, sin)),
        # besides, a float32 cosine and sine for each pair of a token
        work=Work(num_bytes + num_tokens * head_dim * 4, num_bytes),
        peers={"torch": plain},
    )


def plain(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return turn(query.float(), cos, sin).bfloat16(), turn(key.float(), cos, sin).bfloat16()
