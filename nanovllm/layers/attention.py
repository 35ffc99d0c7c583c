"""Attention: from the packed projections of a step to the outputs of the heads, through the KV cache."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import KVCache
from nanovllm.context import get_context
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.ops import LayerOps
from nanovllm.layers.torch_ops import TORCH_OPS


class Attention(nn.Module):
    """Causal attention of one layer. The only place that reads get_context().

    num_heads, num_kv_heads: of this rank; num_kv_heads divides num_heads. scale multiplies the scores.
    kv_cache: this layer's part of the cache. Without one (in warm-up) nothing is stored, and only a prefill without
        cached keys is possible.
    """

    def __init__(
        self, num_heads: int, head_dim: int, scale: float, num_kv_heads: int, ops: LayerOps = TORCH_OPS
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.ops = ops
        self.kv_cache: KVCache | None = None

    def forward(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        head_norms: tuple[RMSNorm, RMSNorm] | None = None,
        last_tokens: Tensor | None = None,
    ) -> Tensor:
        """Output [T, num_heads, head_dim] of packed query, key and value heads, qkv [T, (H + 2 K) * D].

        head_norms (of one eps) normalise queries and keys head by head, cos and sin [T, D / 2] rotate them. Keys and
        values are stored in the cache, then the queries attend. Raises RuntimeError outside `with set_context(...)`.
        last_tokens: [num_seqs] int64, the index of each sequence's last token in a prefill: only their queries attend.
        """
        context = get_context()
        reads_cache = context.block_tables is not None
        if self.kv_cache is None and reads_cache:
            raise RuntimeError("attention over cached keys needs a kv_cache")
        k_cache, v_cache = self.kv_cache or (None, None)
        slot_mapping = None if k_cache is None else context.slot_mapping
        q_weight, k_weight = (norm.weight for norm in head_norms) if head_norms else (None, None)
        eps = head_norms[0].eps if head_norms else 0.0
        query, key = self.ops.qk_norm_rope_store(
            *(qkv, cos, sin, q_weight, k_weight, eps, self.num_heads, k_cache, v_cache, slot_mapping),
            num_kv_heads=self.num_kv_heads,
            returns_key=not reads_cache,
        )
        if last_tokens is not None:
            query = query.index_select(0, last_tokens)
            one_query_each = torch.arange(len(last_tokens) + 1, dtype=torch.int32, device=query.device)
            context = replace(context, cu_seqlens_q=one_query_each, max_seqlen_q=1)
        attention = self.ops.attention
        if self.kv_cache is None or not reads_cache:
            value = qkv[:, -self.num_kv_heads * self.head_dim :].unflatten(1, (self.num_kv_heads, self.head_dim))
            return attention.prefill(query, key, value, context, self.scale)
        if context.is_prefill:
            return attention.prefill(query, *self.kv_cache, context, self.scale)
        return attention.decode(query, self.kv_cache, context, self.scale)
