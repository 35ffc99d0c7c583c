"""Attention backend "flash_attn": flash-attn 2 for prefill and decode. NVIDIA GPUs only."""

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.attention.backend import AttentionBackend, AttentionRequirements, KVCache, unsupported_device_reason
from nanovllm.config import FLASH_ATTENTION_BLOCK_SIZE
from nanovllm.context import Context
from nanovllm.kernels import flash_attention

HEAD_DIMS = {torch.bfloat16: (32, 64, 128), torch.float16: (64, 128)}  # values with which flash-attn was verified


class FlashAttentionBackend(AttentionBackend):
    """AttentionBackend that calls kernels.flash_attention."""

    name = "flash_attn"
    is_graph_safe = True

    @classmethod
    def unsupported_reason(cls, requirements: AttentionRequirements) -> str | None:
        device, dtype = requirements.device, requirements.dtype
        head_dim, block_size = requirements.head_dim, requirements.block_size or cls.default_block_size
        if (reason := unsupported_device_reason(device)) is not None:
            return reason
        dtype_name = str(dtype).removeprefix("torch.")
        if dtype not in HEAD_DIMS:
            return f"it computes in bfloat16 or float16, the dtype is {dtype_name}"
        if head_dim not in HEAD_DIMS[dtype]:
            return f"with {dtype_name} it takes a head_dim in {HEAD_DIMS[dtype]}, the model's is {head_dim}"
        if block_size % FLASH_ATTENTION_BLOCK_SIZE:
            return f"kv_cache_block_size must be a multiple of {FLASH_ATTENTION_BLOCK_SIZE}, got {block_size}"
        if (error := flash_attention.import_error()) is not None:
            return f"flash-attn cannot be imported ({error}), see `pip install flash-attn`"
        return kernels.unsupported_reason(device, dtype)  # a Triton kernel stores the keys and values

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, context: Context, scale: float) -> Tensor:
        lens = (context.cu_seqlens_q, context.cu_seqlens_k, context.max_seqlen_q, context.max_seqlen_k)
        return flash_attention.flash_attention_prefill(query, key, value, *lens, scale, context.block_tables)

    def decode(self, query: Tensor, cache: KVCache, context: Context, scale: float) -> Tensor:
        assert context.block_tables is not None
        return flash_attention.flash_attention_decode(query, *cache, context.context_lens, context.block_tables, scale)
