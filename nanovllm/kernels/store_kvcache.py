"""store_kvcache: new keys and values go to their slots in the paged cache. One program a token and tile of its row."""

import torch
import triton
import triton.language as tl

MAX_TILE_SIZE = 2048


def store_kvcache(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    max_tile_size: int = MAX_TILE_SIZE,
) -> None:
    """Write key[i], value[i] to slot slot_mapping[i] of the caches, in place; negative slots are skipped.

    key, value: [num_tokens, num_kv_heads, head_dim], last dimension contiguous (so views of a packed qkv).
    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous, of any size.
    slot_mapping: [num_tokens] int32 or int64, contiguous; no two tokens share a slot. max_tile_size: a power of two.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    assert key.stride(2) == value.stride(2) == 1
    assert all(tensor.is_contiguous() for tensor in (k_cache, v_cache, slot_mapping))
    assert value.shape == key.shape
    assert slot_mapping.shape == key.shape[:1]
    assert k_cache.shape[2:] == v_cache.shape[2:] == key.shape[1:]
    if num_tokens == 0:
        return
    row_size = num_kv_heads * head_dim
    tile_size = min(triton.next_power_of_2(row_size), max_tile_size)
    store_kvcache_kernel[(num_tokens, triton.cdiv(row_size, tile_size))](
        key,
        value,
        k_cache,
        v_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        row_size,
        HEAD_DIM=head_dim,  # pyright: ignore[reportArgumentType]
        TILE_SIZE=tile_size,
    )


@triton.jit
def store_kvcache_kernel(
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    row_size,
    HEAD_DIM: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # int64: token * stride and slot * row_size pass 2**31 on large GPUs
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot >= 0:
        element = tl.program_id(1) * TILE_SIZE + tl.arange(0, TILE_SIZE)
        in_row = element < row_size
        head = element // HEAD_DIM
        dim = element % HEAD_DIM
        key = tl.load(key_ptr + token * key_token_stride + head * key_head_stride + dim, mask=in_row)
        value = tl.load(value_ptr + token * value_token_stride + head * value_head_stride + dim, mask=in_row)
        tl.store(k_cache_ptr + slot * row_size + element, key, mask=in_row)
        tl.store(v_cache_ptr + slot * row_size + element, value, mask=in_row)
