"""The calls into flash-attn 2 (Dao 2023, arXiv 2307.08691), an extra: only these functions import it, when called.

Letters: T tokens, B sequences, H query heads, K kv heads, D head_dim. Tensors on one GPU, bfloat16 or float16, last
dimension contiguous. Caches: [num_blocks, block_size, K, D], block_size a multiple of 256; block_table [B, max_blocks]
int32, of which entries beyond a sequence's length are not read. Query i of q is at position k_len - q_len + i.
"""

from torch import Tensor


def import_error() -> str | None:
    """Why flash-attn cannot be imported, or None if it can."""
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:  # a build for another version of torch or CUDA raises it too
        return str(error)
    return None


def flash_attention_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    block_table: Tensor | None = None,
) -> Tensor:
    """Causal attention [T, H, D] of packed query [T, H, D]; cu_seqlens: [B + 1] int32.

    key, value: packed [num_keys, K, D], or the caches if there is a block_table.
    """
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        softmax_scale=scale, causal=True, block_table=block_table,
    )  # fmt: skip


def flash_attention_decode(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, context_lens: Tensor, block_table: Tensor, scale: float
) -> Tensor:
    """Attention [B, H, D] of one query a sequence [B, H, D] over its context_lens [B] int32 cached keys."""
    from flash_attn import flash_attn_with_kvcache

    output = flash_attn_with_kvcache(
        query[:, None], k_cache, v_cache,
        cache_seqlens=context_lens, block_table=block_table, softmax_scale=scale, causal=True,
    )  # fmt: skip
    return output[:, 0]
