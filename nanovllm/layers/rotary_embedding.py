"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with the scalings of linear, llama3 and yarn.

Angles are computed once in a forward pass and shared by all layers, so there is no table of all positions.
"""

import math

import torch
from torch import Tensor, nn

from nanovllm.rope_config import RopeConfig


class RotaryEmbedding(nn.Module):
    """positions [T] -> (cos, sin), each [T, head_dim / 2], float32.

    Frequencies and angles are float32, as in training; float64 angles would differ from those of the training. The
    frequencies are no buffer, since a cast of the model would cast a buffer too; they are on torch's default device.
    """

    def __init__(self, head_dim: int, rope: RopeConfig) -> None:
        super().__init__()
        self.attention_factor = rope.attention_factor
        self.inv_freq = inverse_frequencies(head_dim, rope).to(torch.get_default_device())

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[:, None].float() * self.inv_freq
        if self.attention_factor == 1:
            return angle.cos(), angle.sin()
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """[head_dim / 2] float32, on the CPU whatever the model's device: the angle of each pair per position."""
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if rope.rope_type == "default":
        return inv_freq
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    keep = _UNSCALED_FRACTION[rope.rope_type](inv_freq, head_dim, rope)
    return inv_freq / rope.factor * (1 - keep) + inv_freq * keep


# These divide a pair's frequency by factor, leave it, or mix both: `keep`, in [0, 1], is how much is left.


def _keep_llama3(inv_freq: Tensor, head_dim: int, rope: RopeConfig) -> Tensor:
    """1 for pairs of more than high_freq_factor turns over the trained length, 0 below low_freq_factor, else linear."""
    turns = rope.original_max_position_embeddings / (2 * math.pi / inv_freq)
    return ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)


def _keep_yarn(inv_freq: Tensor, head_dim: int, rope: RopeConfig) -> Tensor:
    """Falls linearly with the pair's index from the pair with beta_fast turns to the pair with beta_slow turns.

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
    # As in transformers: only equal ends are moved apart, and with beta_fast < beta_slow `last` comes before `first`.
    return 1 - ((index - first) / ((last - first) or 0.001)).clamp(0, 1)


_UNSCALED_FRACTION = {"llama3": _keep_llama3, "yarn": _keep_yarn}
