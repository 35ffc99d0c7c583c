"""Attention: stores keys and values in the layer's KV cache and attends over it, through the chosen backend."""

import torch
from torch import nn

from nanovllm.attention.backend import AttentionBackend
from nanovllm.context import Context, get_context
from nanovllm.layers.layernorm import RMSNorm


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
        if self.k_cache is not None and self.v_cache is not None:
            self.backend.store(key, value, self.k_cache, self.v_cache, context.slot_mapping)
        return self._attend(query, key, value, context)

    def forward_packed(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_norms: tuple[RMSNorm, RMSNorm] | None
    ) -> torch.Tensor:
        """forward() of the heads that qkv [num_tokens, (H + 2 K) * D] packs, once normalised and rotated.

        One kernel normalises (if there are head_norms, of one eps), rotates and stores: where has_kernels(qkv) only.
        cos, sin: [num_tokens, head_dim / 2] float32.
        """
        from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store  # imports triton

        context = get_context()
        q_norm, k_norm = head_norms or (None, None)
        reads_cache = context.block_tables is not None  # then the backend leaves key and value alone
        query, key = qk_norm_rope_store(
            qkv,
            cos,
            sin,
            q_norm.weight if q_norm else None,
            k_norm.weight if k_norm else None,
            q_norm.eps if q_norm else 0.0,
            self.num_heads,
            self.k_cache,
            self.v_cache,
            None if self.k_cache is None else context.slot_mapping,
            num_kv_heads=self.num_kv_heads,
            returns_key=not reads_cache,
        )
        value = qkv[:, -self.num_kv_heads * self.head_dim :].unflatten(1, (self.num_kv_heads, self.head_dim))
        return self._attend(query, value if key is None else key, value, context)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """Attention once the keys are stored."""
        if self.k_cache is None or self.v_cache is None:
            if context.block_tables is not None:
                raise RuntimeError("attention over cached keys needs bind_kv_cache() first")
            return self.backend.prefill(query, key, value, None, None, context, self.scale)
        if context.is_prefill:
            return self.backend.prefill(query, key, value, self.k_cache, self.v_cache, context, self.scale)
        return self.backend.decode(query, self.k_cache, self.v_cache, context, self.scale)
