"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with the scalings of linear, llama3 and yarn.

Angles are computed once in a forward pass and shared by all layers: there is no table to size, to move or to share.
"""

import math

import torch
from torch import nn

from nanovllm.layers.kernel_choice import has_kernels
from nanovllm.rope_config import RopeConfig


class RotaryEmbedding(nn.Module):
    """positions [T] -> (cos, sin), each [T, head_dim / 2], float32.

    Frequencies and angles are float32, as in training: wider angles would differ from those the weights have seen.
    """

    def __init__(self, head_dim: int, rope: RopeConfig) -> None:
        super().__init__()
        self.attention_factor = rope.attention_factor
        self.inv_freq: torch.Tensor
        inv_freq = inverse_frequencies(head_dim, rope).to(torch.get_default_device())
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[override]
        """Follow the model to another device, but stay float32 when it is cast."""
        inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = inv_freq.to(self.inv_freq.device)
        return self

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = positions[:, None].float() * self.inv_freq
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor


def rotate_query_and_key(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """apply_rotary_embedding of query [T, H, D] and of key [T, K, D]."""
    if has_kernels(query):
        from nanovllm.kernels.rotary_embedding import rotary_embedding  # imports triton

        return rotary_embedding(query, key, cos, sin)
    return apply_rotary_embedding(query, cos, sin), apply_rotary_embedding(key, cos, sin)


def apply_rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[..., i], x[..., i + D/2]) of x [T, heads, D] by the angles of cos and sin [T, D/2].

    Computed in float32 or wider and returned in x's dtype; x is left as it is.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> torch.Tensor:
    """[head_dim / 2] float32 on the CPU, where all devices take them from: the angle a pair turns by per position."""
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if rope.rope_type == "default":
        return inv_freq
    keep = _SHARE_KEPT[rope.rope_type](inv_freq, head_dim, rope)
    return inv_freq / rope.factor * (1 - keep) + inv_freq * keep


# Scalings divide a pair's frequency by factor, leave it, or mix both: the share left as it is, in [0, 1], is `keep`.


def _keep_linear(inv_freq: torch.Tensor, head_dim: int, rope: RopeConfig) -> torch.Tensor:
    return torch.zeros_like(inv_freq)


def _keep_llama3(inv_freq: torch.Tensor, head_dim: int, rope: RopeConfig) -> torch.Tensor:
    """By how often a pair turned over the length trained on: more than high_freq_factor, all of it."""
    turns = rope.original_max_position_embeddings / (2 * math.pi / inv_freq)
    return ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)


def _keep_yarn(inv_freq: torch.Tensor, head_dim: int, rope: RopeConfig) -> torch.Tensor:
    """Falls linearly with the pair's index, from the pair of beta_fast turns to the pair of beta_slow turns.

    Paper: Peng et al. 2023 (arXiv 2309.00071).
    """

    def pair_with(turns: float) -> float:
        longest = rope.original_max_position_embeddings / (2 * math.pi * turns)
        return head_dim * math.log(longest) / (2 * math.log(rope.theta))

    first, last = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32, device=inv_freq.device)
    return 1 - ((index - first) / max(last - first, 0.001)).clamp(0, 1)


_SHARE_KEPT = {"linear": _keep_linear, "llama3": _keep_llama3, "yarn": _keep_yarn}
