"""Arithmetic row by row: each row of a matrix product, and each query of attention, is computed alone.

A matrix library may add up a row's products in another order when the batch has other rows, so the last bits of
float32 results depend on the batch. With this arithmetic they do not: every token is computed by the same operations on
operands of the same shapes, for every batch, chunk and cache. So a remaining difference is an error of the engine.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

from nanovllm.attention.backend import KVCache
from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.context import Context
from nanovllm.layers import packed_weights

linear = functional.linear
attention = functional.scaled_dot_product_attention


def linear_row_by_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.cat([linear(row, weight, bias) for row in x.split(1)]) if len(x) else linear(x, weight, bias)


def prefill_query_by_query(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, scale: float
) -> torch.Tensor:
    q_bounds, k_bounds = context.cu_seqlens_q.tolist(), context.cu_seqlens_k.tolist()
    outputs = []
    for index, (k_start, k_end) in enumerate(pairwise(k_bounds)):
        if context.block_tables is None:
            keys, values = key[k_start:k_end], value[k_start:k_end]
        else:
            keys, values = gathered(context.block_tables[index], k_end - k_start, KVCache(key, value))
        queries = query[q_bounds[index] : q_bounds[index + 1]]
        for number, one_query in enumerate(queries, start=1 + len(keys) - len(queries)):
            outputs.append(attend(one_query, keys[:number], values[:number], scale))
    return torch.stack(outputs)


def decode_query_by_query(
    self: Any, query: torch.Tensor, cache: KVCache, context: Context, scale: float
) -> torch.Tensor:
    assert context.block_tables is not None
    rows = zip(query, context.block_tables, context.context_lens.tolist(), strict=True)
    return torch.stack([attend(one, *gathered(table, num_keys, cache), scale) for one, table, num_keys in rows])


def gathered(table: torch.Tensor, num_keys: int, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(num_keys)
    blocks, offsets = table[positions // cache.k.shape[1]].long(), positions % cache.k.shape[1]
    return cache.k[blocks, offsets], cache.v[blocks, offsets]


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """[num_heads, head_dim] of one query over exactly the keys it sees."""
    q, k, v = (x.transpose(0, 1).contiguous()[None] for x in (query[None], keys, values))
    return attention(q, k, v, scale=scale, enable_gqa=True)[0, :, 0]


@contextmanager
def row_by_row() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(functional, "linear", linear_row_by_row)
        monkeypatch.setattr(packed_weights, "MIN_SIZE", sys.maxsize)  # packed matrices use another product
        monkeypatch.setattr(TorchAttentionBackend, "prefill", prefill_query_by_query)
        monkeypatch.setattr(TorchAttentionBackend, "decode", decode_query_by_query)
        yield
