"""Arithmetic row by row: each row of a matrix product, and each query of attention, is computed alone.

A matrix library may add up a row's products in another order when the batch has other rows, so the last bits of
float32 results depend on the batch. With this arithmetic they do not: every token is computed by the same operations on
operands of the same shapes, for every batch, chunk and cache. So a remaining difference is an error of the engine.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.context import Context
from nanovllm.layers import packed_weights
from reference.attention import attention
from reference.packing import unpacking
from reference.slot_mapping import slot_mapping

linear = functional.linear


def linear_row_by_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.cat([linear(row, weight, bias) for row in x.split(1)]) if len(x) else linear(x, weight, bias)


def attend_query_by_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, scale: float
) -> torch.Tensor:
    """reference.attention of each query over exactly the keys that it sees."""
    bounds, outputs = context.cu_seqlens_k.tolist(), []
    for index, queries in enumerate(unpacking(query, context.cu_seqlens_q)):
        start, end = bounds[index], bounds[index + 1]
        if context.block_tables is None:
            keys, values = key[start:end], value[start:end]
        else:
            slots = slot_mapping(torch.arange(end - start), context.block_tables[index].long(), key.shape[1])
            keys, values = key.flatten(0, 1)[slots], value.flatten(0, 1)[slots]
        for number, one_query in enumerate(queries.split(1), start=1 + len(keys) - len(queries)):
            outputs.append(attention(one_query, keys[:number], values[:number], scale))
    return torch.cat(outputs)


@contextmanager
def row_by_row() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(functional, "linear", linear_row_by_row)
        monkeypatch.setattr(packed_weights, "MIN_SIZE", sys.maxsize)  # packed matrices use another product
        monkeypatch.setattr(TorchAttentionBackend, "prefill", lambda self, *step: attend_query_by_query(*step))
        monkeypatch.setattr(
            TorchAttentionBackend,
            "decode",
            lambda self, query, cache, *step: attend_query_by_query(query, cache.k, cache.v, *step),
        )
        yield
