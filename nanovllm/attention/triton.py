"""Attention backend "triton": this package's own kernels for store, prefill and decode. NVIDIA GPUs, no flash-attn."""

import torch

from nanovllm.context import Context


class TritonAttentionBackend:
    """AttentionBackend through nanovllm.kernels; choose_attention_backend says what it takes.

    The kernels are imported when first used, since they import triton.
    """

    name = "triton"
    is_graph_safe = True

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        from nanovllm.kernels.store_kvcache import store_kvcache

        store_kvcache(key, value, k_cache, v_cache, slot_mapping)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor | None,
        v_cache: torch.Tensor | None,
        context: Context,
        scale: float,
    ) -> torch.Tensor:
        from nanovllm.kernels.varlen_attention import varlen_attention

        if context.block_tables is not None:
            assert k_cache is not None
            assert v_cache is not None
            key, value = k_cache, v_cache
        return varlen_attention(
            query,
            key,
            value,
            context.cu_seqlens_q,
            context.cu_seqlens_k,
            scale,
            max_seqlen_q=context.max_seqlen_q,
            block_tables=context.block_tables,
        )

    def decode(
        self, query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, context: Context, scale: float
    ) -> torch.Tensor:
        from nanovllm.kernels.paged_attention import paged_attention

        assert context.block_tables is not None
        return paged_attention(
            query,
            k_cache,
            v_cache,
            context.block_tables,
            context.context_lens,
            scale,
            sequence_order=context.sequence_order,
        )
