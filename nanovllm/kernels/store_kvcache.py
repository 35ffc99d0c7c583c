"""store_kvcache: new keys and values go to their slots in the paged cache. One program moves a tile of tokens."""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launching import cdiv, launch, next_power_of_2


def store_kvcache(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    tile_size: int = 1024,
    num_warps: int = 4,
) -> None:
    """Write key[i], value[i] to slot slot_mapping[i] of the caches, in place; negative slots are skipped.

    key, value: [num_tokens, num_kv_heads, head_dim], last dimension contiguous (so views of a packed qkv).
    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous, of any size.
    slot_mapping: [num_tokens] int32 or int64, contiguous; no two tokens share a slot.
    tile_size: elements of key that a program moves, a power of two; the default was the fastest for 1 to 16,384
    tokens. Raises ValueError for other shapes and strides.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    if value.shape != key.shape or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError(
            "key and value must be [num_tokens, num_kv_heads, head_dim] alike with a contiguous last dimension, "
            f"got {list(key.shape)} and {list(value.shape)} of strides {key.stride()} and {value.stride()}"
        )
    if k_cache.shape != v_cache.shape or k_cache.shape[2:] != key.shape[1:]:
        raise ValueError(
            f"k_cache and v_cache must be [num_blocks, block_size, {num_kv_heads}, {head_dim}], as key is, "
            f"got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if slot_mapping.shape != key.shape[:1]:
        raise ValueError(f"slot_mapping must have one slot a token, [{num_tokens}], got {list(slot_mapping.shape)}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and slot_mapping.is_contiguous()):
        raise ValueError("k_cache, v_cache and slot_mapping must be contiguous: pass a layer's part of the whole cache")
    if num_tokens == 0:
        return
    row_size = num_kv_heads * head_dim
    elements = min(next_power_of_2(row_size), tile_size)
    tokens = tile_size // elements
    launch(
        store_kvcache_kernel,
        (cdiv(num_tokens, tokens), cdiv(row_size, elements)),
        key, value, k_cache, v_cache, slot_mapping,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), num_tokens, row_size,
        HEAD_DIM=head_dim, TOKENS=tokens, ELEMENTS=elements, num_warps=num_warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def store_kvcache_kernel(
    key_ptr, value_ptr, k_cache_ptr, v_cache_ptr, slot_mapping_ptr,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, num_tokens, row_size,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_tokens, other=-1)
    token = token.to(tl.int64)[:, None]  # int64: token * stride and slot * row_size exceed 2**31 on large GPUs
    slot = slot.to(tl.int64)[:, None]
    element = (tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS))[None, :]
    is_stored = (slot >= 0) & (element < row_size)
    head = element // HEAD_DIM
    dim = element % HEAD_DIM
    key = tl.load(key_ptr + token * key_token_stride + head * key_head_stride + dim, mask=is_stored)
    value = tl.load(value_ptr + token * value_token_stride + head * value_head_stride + dim, mask=is_stored)
    tl.store(k_cache_ptr + slot * row_size + element, key, mask=is_stored)
    tl.store(v_cache_ptr + slot * row_size + element, value, mask=is_stored)
