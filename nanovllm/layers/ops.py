"""LayerOps: a table of the operations that have several implementations. A model is constructed with one table.

torch_ops.py has the table in plain PyTorch, triton_ops.py that of Triton kernels, and select_ops.py chooses one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.distributed.tensor_parallel import TensorParallel

Operation = Callable[..., Any]


@dataclass(frozen=True)
class LayerOps:
    """One implementation of each operation. None changes its inputs, except all_reduce and the stores into the caches.

    T tokens, B sampled rows, H query heads, K kv heads, D head_dim, E input features, O output features, N experts,
    V vocabulary.
    If attention.is_graph_safe, no other operation waits for the device either, so a CUDA graph can record a step.
    """

    attention: AttentionBackend
    linear: Callable[..., Tensor]  # (x [T, E], weight [O, E], bias [O] or None) -> x weight' + bias
    # (x, residual or None, norm_weight, eps, weight, bias, is_gated=False) -> y, x + residual; y is linear of the
    # normalised sum, or silu_and_mul of that if is_gated. See norm_then_linear
    norm_linear: Callable[..., tuple[Tensor, Tensor]]
    all_reduce: Callable[[Tensor, TensorParallel], Tensor]  # (x [T, E], tp) -> the sum over ranks; may overwrite x
    rms_norm: Callable[..., Tensor]  # (x [T, E] or [T, heads, E], weight [E], eps) -> normalised x
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]  # (x, residual, weight, eps) -> rms_norm of the sum, the sum
    rotary_embedding: Callable[..., tuple[Tensor, Tensor]]  # (query [T, H, D], key [T, K, D], cos [T, D / 2], sin)
    store_kvcache: Callable[..., None]  # (key [T, K, D], value, k_cache, v_cache, slot_mapping [T]); skips slot -1
    qk_norm_rope_store: Callable[..., tuple[Tensor, Any]]  # rms_norm, rotation and store: see separate_steps
    moe: Callable[..., Tensor]  # (x, router_logits [T, N], gate_up_proj, down_proj, top_k, norm_topk_prob) -> [T, E]
    # (logits [B, V], temperature [B], seed_low [B], seed_high [B], position [B], takes_argmax [B]) -> token ids [B].
    # Of logits for a part of the vocabulary: first_token=its first token id, and scores [B] float64, which is written
    sample_unfiltered: Callable[..., Tensor]
    # (run): calls run(), whose Triton kernels are compiled and not launched. None with kernels that are not Triton's
    compile_ahead: Callable[[Callable[[], None]], None] | None = None


def separate_steps(rms_norm: Operation, rotary_embedding: Operation, store_kvcache: Operation) -> Operation:
    """LayerOps.qk_norm_rope_store as three operations, with the contract of kernels.qk_norm_rope_store."""

    def qk_norm_rope_store(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        num_heads: int,
        k_cache: Tensor | None,
        v_cache: Tensor | None,
        slot_mapping: Tensor | None,
        *,
        num_kv_heads: int,
        returns_key: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        heads = qkv.unflatten(1, (-1, 2 * cos.shape[1]))
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_weight is not None:
            query, key = rms_norm(query, q_weight, eps), rms_norm(key, k_weight, eps)
        query, key = rotary_embedding(query, key, cos, sin)
        if k_cache is not None:
            store_kvcache(key, value, k_cache, v_cache, slot_mapping)
        return query, key if returns_key else None

    return qk_norm_rope_store


def norm_then_linear(
    rms_norm: Operation, add_rms_norm: Operation, linear: Operation, silu_and_mul: Operation
) -> Operation:
    """LayerOps.norm_linear as separate operations, with the contract of kernels.skinny_linear.norm_skinny_linear."""

    def norm_linear(
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        is_gated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            normed, total = rms_norm(x, norm_weight, eps), x
        else:
            normed, total = add_rms_norm(x, residual, norm_weight, eps)
        y = linear(normed, weight, bias)
        return silu_and_mul(y) if is_gated else y, total

    return norm_linear
