"""Attention backend "torch": plain PyTorch, on any device and for any block size; the default on the CPU."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanovllm.attention.backend import AttentionBackend, KVCache
from nanovllm.context import Context

# Decode gathers the keys and values of a group of sequences into a padded batch of at most this many tokens, or of a
# single sequence. With 8 heads of 128 in bfloat16, the keys and values of 16,384 tokens take 64 MiB, copied twice.
MAX_GATHERED_TOKENS = 16384
# A prefill over cached keys masks at most this many queries at a time, which bounds the mask and the scores.
MAX_MASKED_QUERIES = 1024


class TorchAttentionBackend(AttentionBackend):
    """AttentionBackend in plain PyTorch."""

    name = "torch"
    is_graph_safe = False

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, context: Context, scale: float) -> Tensor:
        output = torch.empty_like(query)
        q_bounds = pairwise(context.cu_seqlens_q.tolist())
        k_bounds = pairwise(context.cu_seqlens_k.tolist())
        for index, ((q_start, q_end), (k_start, k_end)) in enumerate(zip(q_bounds, k_bounds, strict=True)):
            if context.block_tables is None:
                keys, values = key[k_start:k_end], value[k_start:k_end]
            else:
                block_table = context.block_tables[index].tolist()
                keys, values = (_cached_tokens(cache, block_table, k_end - k_start) for cache in (key, value))
            output[q_start:q_end] = _causal_attention(query[q_start:q_end], keys, values, scale)
        return output

    def decode(self, query: Tensor, cache: KVCache, context: Context, scale: float) -> Tensor:
        decode = self.decode_in_groups if query.is_cuda else self.decode_one_by_one
        return decode(query, cache, context, scale)

    def decode_one_by_one(self, query: Tensor, cache: KVCache, context: Context, scale: float) -> Tensor:
        """Decode on a CPU, where an operation costs little and a copy much: keys of one block are not copied."""
        assert context.block_tables is not None
        queries = query.unflatten(1, (cache.k.shape[2], -1))  # as in decode_in_groups
        output = torch.empty_like(query)
        lengths_and_tables = zip(context.context_lens.tolist(), context.block_tables.tolist(), strict=True)
        for index, (length, block_table) in enumerate(lengths_and_tables):
            keys, values = (_cached_tokens(part, block_table, length).transpose(0, 1)[None] for part in cache)
            attended = scaled_dot_product_attention(queries[index : index + 1], keys, values, scale=scale)
            output[index] = attended.view_as(output[index])
        return output

    def decode_in_groups(self, query: Tensor, cache: KVCache, context: Context, scale: float) -> Tensor:
        """Decode on a GPU, where few large operations are faster: the keys of several sequences in a padded batch."""
        assert context.block_tables is not None
        num_sequences, num_heads, head_dim = query.shape
        block_size, num_kv_heads = cache.k.shape[1:3]
        positions = torch.arange(context.max_seqlen_k, device=query.device)
        # Query heads that share a kv head become queries of one attention: [B, K, H // K, D] over [B, K, max_len, D].
        queries = query.reshape(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
        group_size = max(1, MAX_GATHERED_TOKENS // context.max_seqlen_k)
        outputs = []
        for start in range(0, num_sequences, group_size):
            group = slice(start, start + group_size)
            is_valid = positions < context.context_lens[group, None]  # [B, max_len]
            slots = _slots(context.block_tables[group], positions, block_size)
            keys = _gather_valid(cache.k, slots, is_valid)
            values = _gather_valid(cache.v, slots, is_valid)
            outputs.append(
                scaled_dot_product_attention(
                    queries[group], keys, values, attn_mask=is_valid[:, None, None, :], scale=scale
                )
            )
        return torch.cat(outputs).reshape(num_sequences, num_heads, head_dim)


def slot_view(cache: Tensor) -> Tensor:
    """[num_slots, num_kv_heads, head_dim] view of a cache. Raises RuntimeError if that takes a copy."""
    return cache.view(-1, *cache.shape[2:])


def _cached_tokens(cache: Tensor, block_table: list[int], length: int) -> Tensor:
    """The first `length` tokens of a sequence, [length, num_kv_heads, head_dim]: a view if they lie in one block."""
    block_size = cache.shape[1]
    starts = range(0, length, block_size)
    parts = [cache[block, : length - start] for block, start in zip(block_table, starts, strict=False)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _slots(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """int64 slots [..., num_positions] of positions in block_table [..., max_blocks]; negative for padding."""
    return block_table[..., positions // block_size].long() * block_size + positions % block_size


def _gather_valid(cache: Tensor, slots: Tensor, is_valid: Tensor) -> Tensor:
    """Gather slots [B, max_len] into [B, num_kv_heads, max_len, head_dim], with zeros where not is_valid.

    A slot outside the sequence may hold NaN, and an attention weight of zero times NaN is NaN.
    """
    tokens = slot_view(cache)[torch.where(is_valid, slots, 0)]
    return torch.where(is_valid[..., None, None], tokens, 0).transpose(1, 2)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention [q_len, num_heads, head_dim] of one sequence. Its queries are the last q_len of its k_len positions."""
    q_len, k_len = len(query), len(key)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # [1, heads, len, head_dim]
    if q_len == k_len:
        output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return output[0].transpose(0, 1)
    outputs = []
    for start in range(0, q_len, MAX_MASKED_QUERIES):
        end = min(start + MAX_MASKED_QUERIES, q_len)
        first_position, num_visible = k_len - q_len + start, k_len - q_len + end
        mask = torch.ones(end - start, num_visible, dtype=torch.bool, device=query.device).tril(first_position)
        outputs.append(
            scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, :num_visible],
                v[:, :, :num_visible],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)
