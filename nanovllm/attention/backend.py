"""AttentionBackend: the interface of attention over packed tokens and over the paged KV cache."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.context import Context


@dataclass(frozen=True)
class AttentionRequirements:
    """What an engine requires of its attention backend. block_size: tokens of a KV block."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int


class KVCache(NamedTuple):
    """The paged cache of one layer. k, v: [num_blocks, block_size, num_kv_heads, head_dim]."""

    k: Tensor
    v: Tensor


class AttentionBackend(ABC):
    """Attention of the queries of one step. Reads no cache slot but those of the sequences' own tokens.

    name: as in Config.attention_backend.
    is_graph_safe: a CUDA graph can record decode(), which never waits for the device.
    """

    name: ClassVar[str]
    is_graph_safe: ClassVar[bool]

    @classmethod
    def unsupported_reason(cls, requirements: AttentionRequirements) -> str | None:
        """Why this backend cannot serve `requirements`; None if it can."""
        return None

    @abstractmethod
    def prefill(self, query: Tensor, key: Tensor, value: Tensor, context: Context, scale: float) -> Tensor:
        """Causal attention of packed queries [num_tokens, num_heads, head_dim]; the output has that shape.

        key, value: the step's own [num_tokens, num_kv_heads, head_dim], or the KVCache's k and v if
        context.block_tables is set. scale multiplies the scores.
        """

    @abstractmethod
    def decode(self, query: Tensor, cache: KVCache, context: Context, scale: float) -> Tensor:
        """Attention of one query a sequence [num_seqs, num_heads, head_dim] over its context_lens cached keys."""


MIN_COMPUTE_CAPABILITY = (8, 0)  # Ampere


def old_gpu_reason(device: torch.device) -> str | None:
    """Why a GPU is too old for the backends "triton" and "flash_attn"; None if it is not."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_COMPUTE_CAPABILITY:
        return f"it needs compute capability {MIN_COMPUTE_CAPABILITY}, the GPU has {capability}"
    return None
