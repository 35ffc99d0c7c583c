"""Random inputs of the kernels, on the GPU, in bfloat16; a different `index` gives different ones in other memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

MAX_MODEL_LEN = 4096  # of the engine whose decode graphs are timed: how wide their block tables are


def randn(index: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(index)
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def cumulated(lens: Sequence[int]) -> torch.Tensor:
    """[len(lens) + 1] int32, from 0."""
    return int32([0, *lens]).cumsum(0, dtype=torch.int32)


def paged_cache(
    index: int, lens: Sequence[int], num_kv_heads: int, head_dim: int, block_size: int, min_table_width: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache, block_tables) that hold len(lens) sequences, their blocks in random order."""
    num_blocks = [-(-length // block_size) for length in lens]
    ids = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(index), dtype=torch.int32)
    block_tables = torch.full((len(lens), max(min_table_width, *num_blocks)), -1, dtype=torch.int32)
    for row, own in zip(block_tables, ids.split(num_blocks), strict=True):
        row[: len(own)] = own
    k_cache, v_cache = randn(index, 2, len(ids), block_size, num_kv_heads, head_dim)
    return k_cache, v_cache, block_tables.cuda()


def attend_one_by_one(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Plain PyTorch: gather each sequence's keys and values, then scaled_dot_product_attention in `dtype`."""
    block_size = k_cache.shape[1]
    outputs = []
    for own, table, num_keys in zip(query.split(list(query_lens)), block_tables, key_lens, strict=True):
        blocks = table[: -(-num_keys // block_size)]
        key, value = (
            cache[blocks].flatten(0, 1)[:num_keys].transpose(0, 1)[None].to(dtype) for cache in (k_cache, v_cache)
        )
        options: dict[str, Any] = {"enable_gqa": True}
        if len(own) == num_keys:
            options["is_causal"] = True
        elif len(own) > 1:
            at = torch.arange(num_keys, device=query.device)
            options["attn_mask"] = at[None] <= at[num_keys - len(own) :, None]
        output = functional.scaled_dot_product_attention(own.transpose(0, 1)[None].to(dtype), key, value, **options)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
