"""LayerOps in plain PyTorch: on any device, in any floating dtype. Wide means float32, or float64 if x is float64."""

import torch
from torch import Tensor
from torch.nn import functional

from nanovllm.attention.torch import TorchAttentionBackend, slot_view
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.ops import LayerOps, norm_then_linear, separate_steps
from nanovllm.layers.sampler import sample_unfiltered_in_torch


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Mean and division are wide, the product with weight has x's dtype, which is how the models were trained."""
    return weight * functional.rms_norm(_wide(x), x.shape[-1:], eps=eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    heads = apply_rotary_embedding(torch.cat([query, key], dim=1), cos, sin)
    rotated_query, rotated_key = heads.split([query.shape[1], key.shape[1]], dim=1)
    return rotated_query, rotated_key


def apply_rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[..., i], x[..., i + D/2]) of x [T, heads, D] by the angles of cos and sin [T, D/2].

    Computed wide and returned in x's dtype.
    """
    first, second = _wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned_first, turned_second = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.cat([turned_first, turned_second], dim=-1).to(x.dtype)


def store_kvcache(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    is_stored = slot_mapping >= 0
    if not is_stored.all():
        slot_mapping, key, value = slot_mapping[is_stored], key[is_stored], value[is_stored]
    slot_view(k_cache)[slot_mapping] = key
    slot_view(v_cache)[slot_mapping] = value


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, E], weight [N, E] as in torch or packed by pack_weights, bias [N] -> [T, N]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def all_reduce(x: Tensor, tp: TensorParallel) -> Tensor:
    return tp.all_reduce(x)


def moe(
    x: Tensor, router_logits: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k: int, norm_topk_prob: bool
) -> Tensor:
    weights, experts = choose_experts(router_logits, top_k, norm_topk_prob)
    return apply_experts(x, experts, weights, gate_up_proj, down_proj)


def choose_experts(router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """(weights, experts), each [T, top_k]. The softmax is wide and over all experts; weights have the logits' dtype."""
    weights, experts = _wide(router_logits).softmax(dim=-1).topk(top_k, dim=-1)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(router_logits.dtype), experts


def apply_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The weighted sum [T, E] over each token's experts, expert by expert. Copies from the device which were chosen."""
    output = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        token, choice = torch.where(experts == expert)
        hidden = functional.linear(silu_and_mul(functional.linear(x[token], gate_up_proj[expert])), down_proj[expert])
        output.index_add_(0, token, hidden * weights[token, choice, None])
    return output


TORCH_OPS = LayerOps(
    attention=TorchAttentionBackend(),
    linear=linear,
    all_reduce=all_reduce,
    norm_linear=norm_then_linear(rms_norm, add_rms_norm, linear, silu_and_mul),
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rotary_embedding=rotary_embedding,
    store_kvcache=store_kvcache,
    qk_norm_rope_store=separate_steps(rms_norm, rotary_embedding, store_kvcache),
    moe=moe,
    sample_unfiltered=sample_unfiltered_in_torch,
)
