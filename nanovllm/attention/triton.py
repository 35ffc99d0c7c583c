"""Attention backend "triton": this package's own kernels for prefill and decode. NVIDIA GPUs, without flash-attn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanovllm import kernels
from nanovllm.attention.backend import AttentionBackend, AttentionRequirements, KVCache, unsupported_device_reason
from nanovllm.config import MIN_TRITON_BLOCK_SIZE
from nanovllm.context import SEQS_PER_TILE, Context


@dataclass(frozen=True, eq=False)
class TritonAttentionBackend(AttentionBackend):
    """AttentionBackend through the kernels that it is constructed with."""

    name = "triton"
    default_block_size = 64  # on an H200 as fast as 256 or faster, and the prefix cache finds more
    is_graph_safe = True
    shares_prefixes = True

    varlen_attention: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    shared_prefix_attention: Callable[..., Any]

    @classmethod
    def unsupported_reason(cls, requirements: AttentionRequirements) -> str | None:
        device, dtype = requirements.device, requirements.dtype
        reason = unsupported_device_reason(device) or kernels.unsupported_reason(device, dtype)
        if reason is not None:
            return reason
        if requirements.head_dim not in kernels.HEAD_DIMS:
            return f"it takes a head_dim in {kernels.HEAD_DIMS}, the model's is {requirements.head_dim}"
        block_size = requirements.block_size or cls.default_block_size
        if block_size < MIN_TRITON_BLOCK_SIZE or block_size & (block_size - 1):
            return f"kv_cache_block_size must be a power of two from {MIN_TRITON_BLOCK_SIZE}, got {block_size}"
        return None

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, context: Context, scale: float) -> Tensor:
        return self.varlen_attention(
            *(query, key, value, context.cu_seqlens_q, context.cu_seqlens_k, scale),
            max_seqlen_q=context.max_seqlen_q,
            block_tables=context.block_tables,
        )

    def decode(self, query: Tensor, cache: KVCache, context: Context, scale: float) -> Tensor:
        tables, order, lens = context.block_tables, context.shared_prefix_order, context.shared_prefix_lens
        shared_prefix = None
        if order is not None:
            shared_prefix = self.shared_prefix_attention(
                query, *cache, tables, order, lens, scale, seqs_per_tile=SEQS_PER_TILE
            )
        return self.paged_attention(
            *(query, *cache, tables, context.context_lens, scale),
            sequence_order=context.sequence_order,
            shared_prefix=shared_prefix,
        )
