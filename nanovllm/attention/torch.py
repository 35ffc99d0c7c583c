"""Attention backend "torch": plain PyTorch, on any device and for any block size; the default on the CPU."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanovllm.attention.backend import AttentionBackend, KVCache
from nanovllm.context import Context

# Decode copies the keys and values of several sequences into a padded batch of at most this many bytes, or of a single
# sequence. On a CPU the copies stay in its cache: 8 sequences of 1000 tokens took half the time of one batch of 12 MB.
MAX_GATHERED_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
# A prefill over cached keys masks at most this many queries at a time, which bounds the mask and the scores.
MAX_MASKED_QUERIES = 1024


class Group(NamedTuple):
    """Sequences `start` to `end` of a decode step, B in all, whose keys are gathered into one batch of max_len tokens.

    slots: [B * max_len] int64, where their tokens lie. Padding repeats a sequence's last token: any other slot may hold
        NaN, and an attention weight of zero times NaN is NaN.
    is_valid: [B, 1, 1, max_len] bool, False for padding; None without padding.
    """

    start: int
    end: int
    slots: Tensor
    is_valid: Tensor | None


class TorchAttentionBackend(AttentionBackend):
    """AttentionBackend in plain PyTorch."""

    name = "torch"
    is_graph_safe = False

    def __init__(self) -> None:
        self.groups: WeakKeyDictionary[Context, list[Group]] = WeakKeyDictionary()  # of the step, for all its layers

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, context: Context, scale: float) -> Tensor:
        output = torch.empty_like(query)
        q_bounds = pairwise(context.cu_seqlens_q.tolist())
        k_bounds = pairwise(context.cu_seqlens_k.tolist())
        for index, ((q_start, q_end), (k_start, k_end)) in enumerate(zip(q_bounds, k_bounds, strict=True)):
            if q_start == q_end:
                continue
            if context.block_tables is None:
                keys, values = key[k_start:k_end], value[k_start:k_end]
            else:
                block_table = context.block_tables[index].tolist()
                keys, values = (_cached_tokens(cache, block_table, k_end - k_start) for cache in (key, value))
            output[q_start:q_end] = _causal_attention(query[q_start:q_end], keys, values, scale)
        return output

    def decode(self, query: Tensor, cache: KVCache, context: Context, scale: float) -> Tensor:
        """Several sequences in one operation, since a single one may be too short to keep a device busy."""
        num_kv_heads = cache.k.shape[2]
        groups = self.groups.get(context)
        if groups is None:
            groups = self.groups[context] = _make_groups(context, cache)
        # Query heads that share a kv head become queries of one attention: [B, K, H // K, D] over [B, K, max_len, D].
        queries = query.unflatten(1, (num_kv_heads, -1))
        outputs = []
        for start, end, slots, is_valid in groups:
            keys, values = (_gather(part, slots, end - start) for part in cache)
            outputs.append(
                scaled_dot_product_attention(queries[start:end], keys, values, attn_mask=is_valid, scale=scale)
            )
        return torch.cat(outputs).flatten(1, 2)


def slot_view(cache: Tensor) -> Tensor:
    """[num_slots, num_kv_heads, head_dim] view of a cache. Raises RuntimeError if that takes a copy."""
    return cache.view(-1, *cache.shape[2:])


def _cached_tokens(cache: Tensor, block_table: list[int], length: int) -> Tensor:
    """The first `length` tokens of a sequence, [length, num_kv_heads, head_dim]: a view if they lie in one block."""
    block_size = cache.shape[1]
    starts = range(0, length, block_size)
    parts = [cache[block, : length - start] for block, start in zip(block_table, starts, strict=False)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _make_groups(context: Context, cache: KVCache) -> list[Group]:
    """The groups of a decode step, in the order of its sequences. Copies their lengths from the device."""
    assert context.block_tables is not None
    block_size = cache.k.shape[1]
    token_bytes = 2 * cache.k[0, 0].nbytes
    max_tokens = MAX_GATHERED_BYTES[cache.k.device.type] // token_bytes
    groups = []
    lengths = context.context_lens.tolist()
    for start, end in group_bounds(lengths, max_tokens):
        shortest, longest = min(lengths[start:end]), max(lengths[start:end])
        positions = torch.arange(longest, device=cache.k.device)
        num_tokens = context.context_lens[start:end, None]
        slots = _slots(context.block_tables[start:end], positions.minimum(num_tokens - 1), block_size)
        is_valid = None if shortest == longest else (positions < num_tokens)[:, None, None, :]
        groups.append(Group(start, end, slots.flatten(), is_valid))
    return groups


def group_bounds(lengths: list[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Divide sequences of these lengths into groups of neighbours, (start, end) each; end is excluded.

    Padded to its longest sequence, a group has at most max_tokens tokens, unless it is a single sequence, and at most
    half of them are padding: so a long sequence does not make short ones as slow as itself.
    """
    start = longest = total = 0
    for index, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        if index > start and longest * (index + 1 - start) > min(max_tokens, 2 * total):
            yield start, index
            start, longest, total = index, length, length
    yield start, len(lengths)


def _slots(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """[B, max_len] int64 slots of positions [B, max_len] in block_tables [B, max_blocks]."""
    return block_tables.long().gather(1, positions // block_size) * block_size + positions % block_size


def _gather(cache: Tensor, slots: Tensor, num_sequences: int) -> Tensor:
    """[num_sequences, num_kv_heads, max_len, head_dim] from slots [num_sequences * max_len]."""
    rows = cache.view(-1, cache.shape[2:].numel())  # index_select copies rows 7 times as fast as [slots] does heads
    tokens = rows.index_select(0, slots)
    return tokens.view(num_sequences, -1, *cache.shape[2:]).transpose(1, 2)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention [q_len, num_heads, head_dim] of one sequence. Its queries are the last q_len of its k_len positions."""
    q_len, k_len = len(query), len(key)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # [1, heads, len, head_dim]
    attend = partial(scaled_dot_product_attention, scale=scale, enable_gqa=True)
    if q_len == k_len:
        return attend(q, k, v, is_causal=True)[0].transpose(0, 1)
    outputs = []
    for start in range(0, q_len, MAX_MASKED_QUERIES):
        end = min(start + MAX_MASKED_QUERIES, q_len)
        first_position, num_visible = k_len - q_len + start, k_len - q_len + end
        mask = torch.ones(end - start, num_visible, dtype=torch.bool, device=query.device).tril(first_position)
        outputs.append(attend(q[:, :, start:end], k[:, :, :num_visible], v[:, :, :num_visible], attn_mask=mask))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)
