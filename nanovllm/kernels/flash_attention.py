"""The calls into flash-attn 2 (Dao 2023, arXiv 2307.08691), which is imported when first asked for: it is an extra.

Letters: T tokens, B sequences, H query heads, K kv heads, D head_dim. Tensors on one GPU, bfloat16 or float16, last
dimension contiguous. Caches: [num_blocks, block_size, K, D], block_size a multiple of 256; block_table [B, max_blocks]
int32, of which entries beyond a sequence's length are not read. Query i of q sits at position k_len - q_len + i.
"""

import torch


def import_error() -> str | None:
    """Why flash-attn cannot be imported, or None if it can."""
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:  # also what a build for another torch or CUDA raises
        return str(error)
    return None


def flash_attention_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention [T, H, D] of packed query [T, H, D]; cu_seqlens: [B + 1] int32.

    key, value: packed [num_keys, K, D], or the caches if there is a block_table.
    """
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        block_table=block_table,
    )


def flash_attention_decode(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention [B, H, D] of one query a sequence [B, H, D] over its context_lens [B] int32 cached keys."""
    from flash_attn import flash_attn_with_kvcache

    output = flash_attn_with_kvcache(
        query[:, None],
        k_cache,
        v_cache,
        cache_seqlens=context_lens,
        block_table=block_table,
        softmax_scale=scale,
        causal=True,
    )
    return output[:, 0]
