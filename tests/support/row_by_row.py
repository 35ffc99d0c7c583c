"""Arithmetic row by row: each row of a matrix product, and each query of attention, is computed alone.

A matrix library may add up a row's products in another order when the batch has other rows, so the last bits of
float32 results depend on the batch. With this arithmetic they do not: every token is computed by the same operations on
operands of the same shapes, for every batch, chunk and cache. So a remaining difference is an error of the engine.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    for index in range(len(q_bounds) - 1):
        q_start, q_end = q_bounds[index : index + 2]
        num_keys = k_bounds[index + 1] - k_bounds[index]
        if context.block_tables is None:
            keys, values = (x[k_bounds[index] : k_bounds[index + 1]] for x in (key, value))
        else:
            keys, values = gathered(context.block_tables[index], num_keys, KVCache(key, value))
        for number, one_query in enumerate(query[q_start:q_end]):
            end = num_keys - (q_end - q_start) + number + 1
            outputs.append(attend(one_query, keys[:end], values[:end], scale))
    return torch.stack(outputs)


def decode_query_by_query(
    self: Any, query: torch.Tensor, cache: KVCache, context: Context, scale: float
) -> torch.Tensor:
    assert context.block_tables is not None
    outputs = []
    for one_query, table, num_keys in zip(query, context.block_tables, context.context_lens.tolist(), strict=True):
        outputs.append(attend(one_query, *gathered(table, num_keys, cache), scale))
    return torch.stack(outputs)


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
