"""Cases of rotary_embedding for a device: see tests/support/kernels/interpreting.py."""

from functools import partial

import torch

from nanovllm.layers.rotary_embedding import apply_rotary_embedding
from reference.rotary_embedding import inverse_frequencies
from tests.support.kernels.accuracy import assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.interpreting import Guards


def tables(num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D/2] in float32, as the layer gives them, of positions that do not follow one another."""
    angle = (torch.arange(num_tokens) * 37 % 101)[:, None] * inverse_frequencies(head_dim, 10000.0, {})[0]
    return angle.cos().float(), angle.sin().float()


def check_shape(num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Query and key are views of a packed qkv. The layer's formula in float64 is exact for the tables given."""
    from nanovllm.kernels.rotary_embedding import rotary_embedding

    guards, generator = Guards(device), torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = heads
    packed = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    inputs = guards.read(packed).split([num_heads, num_kv_heads, num_kv_heads], dim=1)[:2]
    cos, sin = (guards.read(table) for table in tables(num_tokens, head_dim))
    with guards:
        outputs = rotary_embedding(*inputs, cos, sin)
    guards.assert_intact()
    for actual, x in zip(outputs, inputs, strict=True):
        exact = apply_rotary_embedding(x.double(), cos.double(), sin.double())
        assert_within_twice_the_error_of_plain_torch(
            "rotary_embedding", actual, apply_rotary_embedding(x, cos, sin), exact
        )


def check_far_head(device: str) -> None:
    """D52: heads whose elements lie beyond 2**31; at position 0 nothing turns."""
    from nanovllm.kernels.rotary_embedding import rotary_embedding

    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((2, 3, 64), (64, 2**30 - 64, 1))
    x.copy_(torch.arange(6).view(2, 3, 1) + 1)
    cos, sin = torch.ones(2, 32, device=device), torch.zeros(2, 32, device=device)
    query, key = rotary_embedding(x, x[:, 1:], cos, sin)
    assert torch.equal(query, x)
    assert torch.equal(key, x[:, 1:])


def check_far_token(device: str) -> None:
    """D52: tokens whose elements lie beyond 2**31."""
    from nanovllm.kernels.rotary_embedding import rotary_embedding

    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 1, 64), (2**30, 64, 1))
    x.copy_(torch.arange(3).view(3, 1, 1) + 1)
    cos, sin = torch.ones(3, 32, device=device), torch.zeros(3, 32, device=device)
    query, key = rotary_embedding(x, x, cos, sin)
    assert torch.equal(query, x)
    assert torch.equal(key, x)


SHAPES = [(1, (1, 1), 2), (5, (3, 1), 16), (3, (6, 2), 24), (4, (4, 4), 80), (0, (2, 1), 16)]
CHECKS = {
    f"{num_tokens} x {heads} x {head_dim} {dtype}": partial(check_shape, num_tokens, heads, head_dim, dtype)
    for num_tokens, heads, head_dim in SHAPES
    for dtype in (torch.float32, torch.float16)
}
CHECKS |= {"far head": check_far_head, "far token": check_far_token}
