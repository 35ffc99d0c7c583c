"""Attention backend "flash_attn": flash-attn 2 for prefill and decode, a Triton kernel to store. NVIDIA GPUs only."""

import torch

from nanovllm.context import Context
from nanovllm.kernels.flash_attention import flash_attention_decode, flash_attention_prefill


class FlashAttentionBackend:
    """AttentionBackend through flash-attn; choose_attention_backend says what it takes."""

    name = "flash_attn"
    is_graph_safe = True

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        from nanovllm.kernels.store_kvcache import store_kvcache  # imports triton

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
        if context.block_tables is not None:
            assert k_cache is not None
            assert v_cache is not None
            key, value = k_cache, v_cache
        return flash_attention_prefill(
            query,
            key,
            value,
            context.cu_seqlens_q,
            context.cu_seqlens_k,
            context.max_seqlen_q,
            context.max_seqlen_k,
            scale,
            context.block_tables,
        )

    def decode(
        self, query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, context: Context, scale: float
    ) -> torch.Tensor:
        assert context.block_tables is not None
        return flash_attention_decode(query, k_cache, v_cache, context.context_lens, context.block_tables, scale)
