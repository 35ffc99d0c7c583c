"""Attention: stores keys and values in the layer's KV cache and attends over it, through the chosen backend."""

import torch
from torch import nn

from nanovllm.context import get_context
from nanovllm.layers.attention_backend import AttentionBackend


class Attention(nn.Module):
    """Causal attention of one layer. The only place that reads get_context().

    num_heads, num_kv_heads: of this rank; num_kv_heads divides num_heads. scale multiplies the scores.
    """

    def __init__(
        self, num_heads: int, head_dim: int, scale: float, num_kv_heads: int, backend: AttentionBackend
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.backend = backend
        self.k_cache: torch.Tensor | None = None
        self.v_cache: torch.Tensor | None = None

    def bind_kv_cache(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Use k_cache and v_cache [num_blocks, block_size, num_kv_heads, head_dim], this layer's part of the cache.

        Before (in warm-up) nothing is stored, and only a prefill without cached keys is possible.
        """
        self.k_cache, self.v_cache = k_cache, v_cache

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[num_tokens, num_heads, head_dim] of a query of that shape.

        key, value: [num_tokens, num_kv_heads, head_dim]. The last two dimensions may come as one, and
        views of a packed qkv are welcome.
        """
        context = get_context()
        query = query.view(-1, self.num_heads, self.head_dim)
        key = key.view(-1, self.num_kv_heads, self.head_dim)
        value = value.view(-1, self.num_kv_heads, self.head_dim)
        if self.k_cache is None or self.v_cache is None:
            if context.block_tables is not None:
                raise RuntimeError("attention over cached keys needs bind_kv_cache() first")
            return self.backend.prefill(query, key, value, None, None, context, self.scale)
        self.backend.store(key, value, self.k_cache, self.v_cache, context.slot_mapping)
        if context.is_prefill:
            return self.backend.prefill(query, key, value, self.k_cache, self.v_cache, context, self.scale)
        return self.backend.decode(query, self.k_cache, self.v_cache, context, self.scale)
