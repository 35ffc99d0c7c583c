"""Rotary embedding: turn each pair of a head's coordinates by an angle that grows with the token's position.

    angle[i]     = position * inv_freq[i]                                              for i in 0 .. D/2 - 1
    y[i]         = a * (x[i] * cos(angle[i]) - x[i + D/2] * sin(angle[i]))
    y[i + D/2]   = a * (x[i] * sin(angle[i]) + x[i + D/2] * cos(angle[i]))
    inv_freq[i]  = theta ** (-2i / D) * (keep[i] + (1 - keep[i]) / factor)

Why: the dot product of a query turned m times by an angle and a key turned n times depends on m - n only, so attention
sees distances, not positions. Fast pairs (small i) tell neighbours apart, slow pairs tell far from near.

Why keep: a text longer than those of the training has angles that the model has not seen. Dividing a frequency by
factor maps a text of factor times the length to the known angles; keep[i] says how much of pair i stays as it is. L is
the length of the training, and turns[i] = L * theta ** (-2i / D) / (2 pi) how often pair i turns over that length:
    default  keep = 1
    linear   keep = 0: simple, but neighbours are harder to tell apart
    llama3   keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), within 0 .. 1
    yarn     keep falls linearly in i from 1, where turns = beta_fast, to 0, where turns = beta_slow
yarn also lengthens queries and keys by a = 0.1 ln(factor) + 1: longer texts need sharper attention. Elsewhere a = 1.

Letters: T tokens, heads H or K, D head_dim (even).
Papers: Su et al. 2021 (arXiv 2104.09864); Peng et al. 2023 (yarn, arXiv 2309.00071), section 3.
"""

from collections.abc import Mapping
from math import ceil, floor, log, pi
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_embedding(
    positions: Int[Tensor, "T"],
    x: Float[Tensor, "T heads D"],
    rope_theta: float = 10000.0,
    rope_scaling: Mapping[str, Any] | None = None,
) -> Float[Tensor, "T heads D"]:
    """Rotate queries or keys. rope_scaling is Hugging Face's dict: rope_type, factor, and what the type needs.

    The vector (1, 0) is one pair, and its frequency is 1: at position p it becomes (cos p, sin p). Here p = 0 and 2,
    and then position 8 squeezed to 2:

    >>> rotary_embedding(torch.tensor([0, 2]), torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])).flatten()
    tensor([ 1.0000,  0.0000, -0.4161,  0.9093])
    >>> rotary_embedding(torch.tensor([8]), torch.tensor([[[1.0, 0.0]]]), 1e4, {"rope_type": "linear", "factor": 4})
    tensor([[[-0.4161,  0.9093]]])
    """
    inv_freq, a = inverse_frequencies(x.shape[-1], rope_theta, rope_scaling or {})
    angle = positions.double()[:, None, None] * inv_freq.to(x.device)  # [T, 1, D/2]
    cos, sin = a * angle.cos(), a * angle.sin()
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Float[Tensor, "D/2"], float]:
    """Return (inv_freq in float64, a).

    >>> inverse_frequencies(4, 100.0, {"rope_type": "default"})  # 100 ** 0 and 100 ** -0.5
    (tensor([1.0000, 0.1000], dtype=torch.float64), 1.0)
    """
    rope_type, factor = scaling.get("rope_type") or scaling.get("type") or "default", scaling.get("factor") or 1.0
    trained_len = scaling.get("original_max_position_embeddings") or 1
    i = torch.arange(head_dim // 2, dtype=torch.float64)
    frequency, a = theta ** (-2 * i / head_dim), 1.0
    if rope_type == "default":
        keep = torch.ones_like(i)
    elif rope_type == "linear":
        keep = torch.zeros_like(i)
    elif rope_type == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = trained_len * frequency / (2 * pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif rope_type == "yarn":
        betas = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
        start, stop = (head_dim * log(trained_len / (2 * pi * turns)) / (2 * log(theta)) for turns in betas)
        if scaling.get("truncate", True):
            start, stop = floor(start), ceil(stop)
        start, stop = max(start, 0), min(stop, head_dim - 1)
        keep = 1 - ((i - start) / ((stop - start) or 0.001)).clamp(0, 1)
        a = yarn_attention_factor(
            factor, **{k: scaling.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim")}
        )
    else:
        raise ValueError(f"rope_type must be default, linear, llama3 or yarn, got {rope_type!r}")
    return frequency * (keep + (1 - keep) / factor), a


def yarn_attention_factor(
    factor: float,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> float:
    """The a of yarn: attention_factor if the checkpoint has it, or the ratio that mscale and mscale_all_dim give.

    >>> round(yarn_attention_factor(4.0), 4)  # 0.1 * 1.3863 + 1
    1.1386
    """
    if attention_factor is not None:
        return attention_factor
    logarithm = 0.1 * log(max(factor, 1.0))
    return (mscale * logarithm + 1) / (mscale_all_dim * logarithm + 1) if mscale and mscale_all_dim else logarithm + 1


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
