"""qk_norm_rope_store: the operations between qkv_proj and attention in one launch. One program a token.

A program normalises (for models with head norms) and rotates the query and key heads of a token's packed row, and
stores key and value in the cache: rms_norm, rotary_embedding and store_kvcache with one read and one write, not three.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton's types do not know functions that return several values.)

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels import DTYPES
from nanovllm.kernels.early_launch import pays_between_linear_layers
from nanovllm.kernels.launching import launch, next_power_of_2
from nanovllm.kernels.rms_norm import scale_and_weight
from nanovllm.kernels.rotary_embedding import check_cos_and_sin, rotate

MANY_TOKENS = 1024  # enough programs to fill the GPU several times


def qk_norm_rope_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    num_heads: int,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    *,
    num_kv_heads: int,
    returns_key: bool = False,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(query [T, H, D], key [T, K, D] if returns_key), normalised and rotated, new, contiguous; the caches in place.

    qkv: [T, (H + 2 K) * D], rows contiguous: query heads, key heads, value heads; float32, float16 or bfloat16.
    cos, sin: [T, D/2] float32, contiguous. q_weight, k_weight: [D] of qkv's dtype, or both None: no norm.
    k_cache, v_cache: [num_blocks, block_size, K, D] of qkv's dtype, contiguous, or None: no store. slot_mapping: [T]
    int32 or int64, contiguous; negative slots are skipped, no two tokens share one.
    Rounds where the three kernels round. Raises ValueError for other shapes, strides and dtypes.
    """
    num_tokens, head_dim = qkv.shape[0], 2 * cos.shape[-1]
    row = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.shape != (num_tokens, row) or qkv.stride(1) != 1 or qkv.dtype not in DTYPES:
        raise ValueError(
            f"qkv must be [T, {row}] ({num_heads} + 2 * {num_kv_heads} heads of {head_dim}) with contiguous rows in "
            f"float32, float16 or bfloat16, got {list(qkv.shape)} of strides {qkv.stride()} in {qkv.dtype}"
        )
    check_cos_and_sin(cos, sin, num_tokens, head_dim)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given together, or neither, got one of them")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.shape != (head_dim,) or weight.stride(0) != 1 or weight.dtype != qkv.dtype):
            raise ValueError(f"{name} must be [{head_dim}], contiguous, in {qkv.dtype}, got {list(weight.shape)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if (cache is None) != (slot_mapping is None):
            raise ValueError("k_cache, v_cache and slot_mapping must be given together, or none, got some of them")
        if cache is None:
            continue
        if cache.shape[2:] != (num_kv_heads, head_dim) or not cache.is_contiguous() or cache.dtype != qkv.dtype:
            raise ValueError(
                f"{name} must be [num_blocks, block_size, {num_kv_heads}, {head_dim}], contiguous, in {qkv.dtype}, "
                f"got {list(cache.shape)} of strides {cache.stride()} in {cache.dtype}"
            )
    if slot_mapping is not None and (slot_mapping.shape != (num_tokens,) or not slot_mapping.is_contiguous()):
        raise ValueError(f"slot_mapping must be [{num_tokens}], contiguous, got {list(slot_mapping.shape)}")
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    key = torch.empty(num_tokens, num_kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device) if returns_key else None
    if num_tokens == 0:
        return query, key
    launches_early = pays_between_linear_layers(qkv.device, num_tokens, row)
    launch(
        qk_norm_rope_store_kernel,
        (num_tokens,),
        qkv, cos, sin, q_weight, k_weight, eps, query, key, k_cache, v_cache, slot_mapping, qkv.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2,
        PADDED_HALF=next_power_of_2(head_dim // 2),
        PADDED_HEADS=next_power_of_2(num_heads),
        PADDED_KV_HEADS=next_power_of_2(num_kv_heads),
        HAS_NORM=q_weight is not None, HAS_CACHE=k_cache is not None, RETURNS_KEY=returns_key,
        LAUNCHES_EARLY=launches_early, launch_pdl=launches_early,
        num_warps=choose_num_warps(num_tokens, row) if num_warps is None else num_warps,
    )  # fmt: skip
    return query, key


def choose_num_warps(num_tokens: int, row: int) -> int:
    """Warps of a program. As measured, many threads are faster for few tokens, and few threads for many tokens."""
    if num_tokens < MANY_TOKENS:
        return 8 if row > 2048 else 4
    return 4 if row > 6144 else 2 if row > 2048 else 1


@triton.jit
def qk_norm_rope_store_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps,
    query_ptr, key_ptr, k_cache_ptr, v_cache_ptr, slot_mapping_ptr, qkv_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr, PADDED_HEADS: tl.constexpr, PADDED_KV_HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_CACHE: tl.constexpr, RETURNS_KEY: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, PADDED_HALF)[None, :]
    in_half = dim < HALF
    q_head, kv_head = tl.arange(0, PADDED_HEADS)[:, None], tl.arange(0, PADDED_KV_HEADS)[:, None]
    q_mask, kv_mask = (q_head < NUM_HEADS) & in_half, (kv_head < NUM_KV_HEADS) & in_half

    # All loads come first, so that all are in flight before the first result is used.
    cos = tl.load(cos_ptr + token * HALF + dim, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + dim, mask=in_half, other=0.0)
    if HAS_CACHE:
        slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if LAUNCHES_EARLY:
        gdc_wait()  # for qkv, and for the kernels that read the cache
        gdc_launch_dependents()
    row_ptr = qkv_ptr + token * qkv_stride + dim
    q_first = tl.load(row_ptr + q_head * D, mask=q_mask, other=0.0)
    q_second = tl.load(row_ptr + q_head * D + HALF, mask=q_mask, other=0.0)
    row_ptr += NUM_HEADS * D
    k_first = tl.load(row_ptr + kv_head * D, mask=kv_mask, other=0.0)
    k_second = tl.load(row_ptr + kv_head * D + HALF, mask=kv_mask, other=0.0)
    if HAS_CACHE:
        row_ptr += NUM_KV_HEADS * D
        v_first = tl.load(row_ptr + kv_head * D, mask=kv_mask, other=0.0)
        v_second = tl.load(row_ptr + kv_head * D + HALF, mask=kv_mask, other=0.0)

    if HAS_NORM:
        q_first, q_second = normalize(q_first, q_second, q_weight_ptr + dim, in_half, eps, HALF)
        k_first, k_second = normalize(k_first, k_second, k_weight_ptr + dim, in_half, eps, HALF)
    q_first, q_second = rotate(q_first, q_second, cos, sin)
    k_first, k_second = rotate(k_first, k_second, cos, sin)

    row_ptr = query_ptr + token * (NUM_HEADS * D) + q_head * D + dim
    tl.store(row_ptr, q_first, mask=q_mask)
    tl.store(row_ptr + HALF, q_second, mask=q_mask)
    offset = kv_head * D + dim
    if RETURNS_KEY:
        row_ptr = key_ptr + token * (NUM_KV_HEADS * D) + offset
        tl.store(row_ptr, k_first, mask=kv_mask)
        tl.store(row_ptr + HALF, k_second, mask=kv_mask)
    if HAS_CACHE:
        kv_mask = kv_mask & (slot >= 0)
        row_ptr = k_cache_ptr + slot * (NUM_KV_HEADS * D) + offset
        tl.store(row_ptr, k_first, mask=kv_mask)
        tl.store(row_ptr + HALF, k_second, mask=kv_mask)
        row_ptr = v_cache_ptr + slot * (NUM_KV_HEADS * D) + offset
        tl.store(row_ptr, v_first, mask=kv_mask)
        tl.store(row_ptr + HALF, v_second, mask=kv_mask)


@triton.jit
def normalize(first, second, weight_ptr, in_half, eps, HALF: tl.constexpr):
    """Both halves of heads [heads, D/2], normalised as rms_norm does."""
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    mean = tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * HALF)
    scale = tl.rsqrt(mean + eps)
    first_weight = tl.load(weight_ptr, mask=in_half, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF, mask=in_half, other=0.0).to(tl.float32)
    first = scale_and_weight(first, scale, first_weight, dtype)
    second = scale_and_weight(second, scale, second_weight, dtype)
    return first.to(dtype), second.to(dtype)
