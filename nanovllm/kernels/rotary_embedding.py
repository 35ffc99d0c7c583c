"""rotary_embedding: rotates queries and keys in one launch. One program a token."""

# pyright: reportGeneralTypeIssues=false
# (Triton's types do not know functions that return several values.)

import torch
import triton
import triton.language as tl

from nanovllm.kernels import DTYPES
from nanovllm.kernels.launching import launch, next_power_of_2


def rotary_embedding(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, num_warps: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key with the pairs (x[..., i], x[..., i + D/2]) turned by the angles of cos and sin; new, contiguous.

    query: [T, H, D]; key: [T, K, D]; one of float32, float16, bfloat16; last dimension contiguous (so views of a packed
    qkv). cos, sin: [T, D/2] float32, contiguous. Computed in float32 and rounded once. Raises ValueError otherwise.
    """
    for name, x in (("query", query), ("key", key)):
        if x.ndim != 3 or x.stride(2) != 1 or x.shape[2] % 2 or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be [T, heads, D] with an even, contiguous last dimension in float32, float16 or "
                f"bfloat16, got {list(x.shape)} of strides {x.stride()} in {x.dtype}"
            )
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if key.shape[::2] != query.shape[::2] or key.dtype != query.dtype:
        raise ValueError(
            f"key must be [{num_tokens}, heads, {head_dim}] in {query.dtype}, as query is, "
            f"got {list(key.shape)} in {key.dtype}"
        )
    check_cos_and_sin(cos, sin, num_tokens, head_dim)
    rotated_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rotated_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    if num_tokens == 0:
        return rotated_query, rotated_key
    launch(
        rotary_embedding_kernel,
        (num_tokens,),
        query, key, cos, sin, rotated_query, rotated_key,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2,
        PADDED_HALF=next_power_of_2(head_dim // 2),
        PADDED_HEADS=next_power_of_2(num_heads),
        PADDED_KV_HEADS=next_power_of_2(num_kv_heads),
        num_warps=choose_num_warps(num_heads, head_dim) if num_warps is None else num_warps,
    )  # fmt: skip
    return rotated_query, rotated_key


def check_cos_and_sin(cos: torch.Tensor, sin: torch.Tensor, num_tokens: int, head_dim: int) -> None:
    """Raise ValueError unless both are [num_tokens, head_dim / 2] float32, contiguous."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (num_tokens, head_dim // 2) or not table.is_contiguous() or table.dtype != torch.float32:
            raise ValueError(
                f"{name} must be [{num_tokens}, {head_dim // 2}], contiguous, float32, "
                f"got {list(table.shape)} of strides {table.stride()} in {table.dtype}"
            )


def choose_num_warps(num_heads: int, head_dim: int) -> int:
    """Warps of a program. Measured with 16 heads of 128; for other sizes in proportion."""
    return 4 if num_heads * head_dim > 2048 else 2


@triton.jit
def rotary_embedding_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, rotated_query_ptr, rotated_key_ptr,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr, PADDED_HEADS: tl.constexpr, PADDED_KV_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, PADDED_HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + dim, mask=dim < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + dim, mask=dim < HALF, other=0.0)

    head = tl.arange(0, PADDED_HEADS)[:, None]
    mask = (head < NUM_HEADS) & (dim < HALF)
    first_ptr = query_ptr + token * query_token_stride + head.to(tl.int64) * query_head_stride + dim
    query_first = tl.load(first_ptr, mask=mask, other=0.0)
    query_second = tl.load(first_ptr + HALF, mask=mask, other=0.0)
    kv_head = tl.arange(0, PADDED_KV_HEADS)[:, None]
    kv_mask = (kv_head < NUM_KV_HEADS) & (dim < HALF)
    first_ptr = key_ptr + token * key_token_stride + kv_head.to(tl.int64) * key_head_stride + dim
    key_first = tl.load(first_ptr, mask=kv_mask, other=0.0)
    key_second = tl.load(first_ptr + HALF, mask=kv_mask, other=0.0)

    first_ptr = rotated_query_ptr + (token * NUM_HEADS + head) * 2 * HALF + dim
    query_first, query_second = rotate(query_first, query_second, cos, sin)
    tl.store(first_ptr, query_first, mask=mask)
    tl.store(first_ptr + HALF, query_second, mask=mask)
    first_ptr = rotated_key_ptr + (token * NUM_KV_HEADS + kv_head) * 2 * HALF + dim
    key_first, key_second = rotate(key_first, key_second, cos, sin)
    tl.store(first_ptr, key_first, mask=kv_mask)
    tl.store(first_ptr + HALF, key_second, mask=kv_mask)


@triton.jit
def rotate(first, second, cos, sin):
    """Both halves of heads [heads, D/2], rotated in float32 and rounded once to their dtype."""
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
