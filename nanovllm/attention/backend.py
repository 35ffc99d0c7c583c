"""AttentionBackend: the interface of attention over packed tokens and over the paged KV cache."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.context import Context


@dataclass(frozen=True)
class AttentionRequirements:
    """What an engine requires of its attention backend. block_size: tokens per KV block; None is default_block_size."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int | None


class KVCache(NamedTuple):
    """The paged cache of one layer. k, v: [num_blocks, block_size, num_kv_heads, head_dim]."""

    k: Tensor
    v: Tensor


class AttentionBackend(ABC):
    """Computes attention for the queries of one step. It reads only the cache slots of the sequences' own tokens.

    name: the value of Config.attention_backend that selects this backend.
    default_block_size: tokens per KV block where the user chose none.
    is_graph_safe: whether a CUDA graph can capture prefill() and decode(): they never synchronise with the device, and
        what they launch depends on shapes, max_seqlen_q and max_seqlen_k only.
    shares_prefixes: whether decode() reads the keys of a shared prefix once, if context.shared_prefix_order is set.
    """

    name: ClassVar[str]
    default_block_size: ClassVar[int] = 256
    is_graph_safe: ClassVar[bool]
    shares_prefixes: ClassVar[bool] = False

    @classmethod
    def unsupported_reason(cls, requirements: AttentionRequirements) -> str | None:
        """Why this backend cannot serve `requirements`; None if it can."""
        return None

    @abstractmethod
    def prefill(self, query: Tensor, key: Tensor, value: Tensor, context: Context, scale: float) -> Tensor:
        """Causal attention of packed queries [num_tokens, num_heads, head_dim]; the output has the shape of query.

        key, value: [num_tokens, num_kv_heads, head_dim] of this step's tokens, or the KVCache's k and v if
        context.block_tables is set. scale: factor of the scores.
        """

    @abstractmethod
    def decode(self, query: Tensor, cache: KVCache, context: Context, scale: float) -> Tensor:
        """Attention of one query per sequence, [num_seqs, num_heads, head_dim], over its context_lens cached keys."""


MIN_COMPUTE_CAPABILITY = (8, 0)  # Ampere


def unsupported_device_reason(device: torch.device) -> str | None:
    """Why the backends "triton" and "flash_attn" cannot compute on `device`; None if they can."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_COMPUTE_CAPABILITY:
        return f"it needs compute capability {MIN_COMPUTE_CAPABILITY}, the GPU has {capability}"
    return None
