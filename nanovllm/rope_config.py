"""RopeConfig: the rotary embedding of a checkpoint, read from either layout of config.json."""

import logging
import math
from dataclasses import dataclass

from nanovllm.config_json import RawConfig, get_bool, get_int, get_number
from nanovllm.validation import require_choice, require_number

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DEFAULT_ROPE_THETA = 10000.0
MAX_ROPE_FACTOR = 1_000_000  # far above all that is used; times a length it fits in an int64

_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}

# Keys that transformers ignores, as we do with a warning -> their meaning in other implementations.
# Any other unknown key is refused, since it may change what the model computes.
_IGNORED = {
    "attn_factor": "YaRN's code and vLLM multiply the attention factor by it; attention_factor states the product",
    "extrapolation_factor": "YaRN's code and vLLM multiply the weight of the unscaled frequencies by it",
    "finetuned": "it says whether the weights were trained with this scaling, and changes no computation",
}

logger = logging.getLogger("nanovllm")


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding. Fields that rope_type does not use have values without effect.

    theta: base of the frequencies. factor: ratio of the supported to the trained context length (linear, llama3, yarn).
    original_max_position_embeddings: context length of the training (llama3, yarn).
    low_freq_factor, high_freq_factor: llama3. beta_fast, beta_slow, truncate: yarn.
    attention_factor: multiplies cos and sin; 1.0 except for yarn.
    """

    rope_type: str = "default"
    theta: float = DEFAULT_ROPE_THETA
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def read_rope(raw: RawConfig, max_position_embeddings: int) -> RopeConfig:
    parameters = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_parameters must be an object, got {parameters!r}")
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"per-layer rope parameters are not supported, got some for {', '.join(nested)}")
    for key in sorted(set(parameters) & _IGNORED.keys()):
        value, meaning = parameters[key], _IGNORED[key]
        logger.warning("config.json: rope parameter %s=%r is not applied, as in transformers: %s", key, value, meaning)
    unknown = sorted(set(parameters) - _ROPE_KEYS - _IGNORED.keys())
    if unknown:
        raise ValueError(f"rope parameters must be among {', '.join(sorted(_ROPE_KEYS))}; got {', '.join(unknown)}")
    for source in (raw, parameters):
        if source.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"partial_rotary_factor must be 1, got {source['partial_rotary_factor']!r}")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    require_choice("rope_type", rope_type, ROPE_TYPES, remedy="nanovllm supports no other")
    theta = get_number(parameters, "rope_theta", get_number(raw, "rope_theta", DEFAULT_ROPE_THETA))
    if rope_type == "default":
        return RopeConfig(theta=theta)
    rule = f"a number from 1 to {MAX_ROPE_FACTOR}"
    require_number("rope factor", parameters.get("factor"), rule, lambda value: 1 <= value <= MAX_ROPE_FACTOR)
    factor = float(parameters["factor"])
    if rope_type == "linear":
        return RopeConfig(rope_type=rope_type, theta=theta, factor=factor)
    # As in transformers, the key of config.json has precedence over that of rope_parameters
    trained_len = get_int(parameters, "original_max_position_embeddings", max_position_embeddings)
    trained_len = get_int(raw, "original_max_position_embeddings", trained_len)
    if rope_type == "llama3":
        low, high = get_number(parameters, "low_freq_factor"), get_number(parameters, "high_freq_factor")
        if high <= low:
            raise ValueError(f"rope high_freq_factor must be above low_freq_factor={low}, got {high}")
        return RopeConfig(rope_type, theta, factor, trained_len, low_freq_factor=low, high_freq_factor=high)
    if theta == 1:
        raise ValueError(
            f"rope_theta must be another number than 1 for yarn, which divides by its logarithm, got {theta}"
        )
    return RopeConfig(
        rope_type,
        theta,
        factor,
        trained_len,
        beta_fast=get_number(parameters, "beta_fast", 32.0),
        beta_slow=get_number(parameters, "beta_slow", 1.0),
        truncate=get_bool(parameters, "truncate", True),
        attention_factor=_yarn_attention_factor(parameters, factor),
    )


def _yarn_attention_factor(parameters: RawConfig, factor: float) -> float:
    """attention_factor if given; else 0.1 ln(factor) + 1 (arXiv 2309.00071, equation 22), or a ratio with mscale."""
    if parameters.get("attention_factor") is not None:
        return get_number(parameters, "attention_factor")
    growth = 0.1 * math.log(factor)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return (growth * get_number(parameters, "mscale") + 1) / (growth * get_number(parameters, "mscale_all_dim") + 1)
    return growth + 1
