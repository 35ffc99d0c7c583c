"""Selects the attention backend: the one that the user named, or the best one that supports what is required."""

import logging

import torch

from nanovllm.attention import flash_attn
from nanovllm.attention.backend import AttentionBackend, AttentionRequirements
from nanovllm.attention.flash_attn import FlashAttentionBackend
from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.attention.triton import TritonAttentionBackend

logger = logging.getLogger("nanovllm")

# In order of preference for "auto", unless triton is faster.
BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (FlashAttentionBackend, TritonAttentionBackend, TorchAttentionBackend)
}
# Here triton was faster than flash_attn in every shape of `pytest --benchmark-only`, prefill and decode. For other GPUs
# and sizes the two were not compared; there flash_attn is preferred.
TRITON_IS_FASTER_ON = (9, 0)  # compute capability of an H100 and an H200
TRITON_IS_FASTER_AT = (64, 128)  # head_dim


def select_attention_backend(requested: str, requirements: AttentionRequirements) -> type[AttentionBackend]:
    """The backend named `requested`, or for "auto" the first that supports `requirements`. Logs its name and why.

    requested: as in Config, which refuses other names. Raises ValueError, with reason and remedy, for a named backend
    that does not support `requirements`.
    """
    if requested == "auto":
        name, reason = _first_supported(requirements)
    else:
        name, reason = requested, "as requested"
        unsupported = BACKENDS[name].unsupported_reason(requirements)
        if unsupported is not None:
            raise ValueError(
                f"attention_backend={requested!r} cannot be used: {unsupported}; use attention_backend='torch', "
                "which runs everywhere"
            )
    logger.info("attention backend: %s (%s)", name, reason)
    return BACKENDS[name]


def _first_supported(requirements: AttentionRequirements) -> tuple[str, str]:
    """(name, reason): the reason is why the backend is preferred, or why those before it are unsupported."""
    names = list(BACKENDS)
    preference = "the first choice"
    device, dtype, head_dim = requirements.device, requirements.dtype, requirements.head_dim
    is_compared = device.type == "cuda" and dtype in flash_attn.HEAD_DIMS and head_dim in TRITON_IS_FASTER_AT
    if is_compared and torch.cuda.get_device_capability(device) == TRITON_IS_FASTER_ON:
        names.sort(key=lambda name: name != "triton")
        preference = f"measured to be faster than flash_attn on such a GPU at head_dim {head_dim}"
    rejected = []
    for name in names:
        unsupported = BACKENDS[name].unsupported_reason(requirements)
        if unsupported is None:
            return name, "; ".join(rejected) or preference
        rejected.append(f"not {name}: {unsupported}")
    raise AssertionError("the torch backend supports everything")
