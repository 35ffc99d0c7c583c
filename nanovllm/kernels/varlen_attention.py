"""varlen_attention: prefill attention of packed sequences, over packed keys or over the paged cache.

One program computes a tile of query rows for one kv head of one sequence. It loops over the keys that the tile attends
to, first to last, with the online softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867), as in Dao 2023
(arXiv 2307.08691).

The G query heads of a kv head are rows of the same tile: row r of a sequence is its query r // G, head r % G of the
group. Each key is read once for the whole group, and fewer keys of the last tile are masked.

The main loop handles the keys that every row of the tile attends to, without a mask. A second loop, with a mask,
handles the last keys, which lie beyond the position of some row or beyond the sequence. The last tile of a sequence
attends to the most keys and is started first, so that no long program starts late.

The contract, the choice of tiles and the kernel are in one file, because each depends on the others.
"""

from functools import cache
from math import e, log2, sqrt
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels import DTYPES, HEAD_DIMS, MIN_BLOCK_SIZE
from nanovllm.kernels.launching import cdiv, launch

HOPPER = (9, 0)
GLUON_VERSIONS = ("3.6.", "3.7.")  # Triton's versions that varlen_attention_hopper compiles with: Gluon is experimental
# The smallest number of keys for varlen_attention_hopper. On an H200, that kernel is slower than the one in this file
# at 100 to 480 keys, because it takes longer to start, and faster at 1024.
MIN_HOPPER_KEYS = 512
MAX_MASKED_KEYS = 64  # keys per tile of the second loop: a smaller tile computes fewer keys that are masked


class TileConfig(NamedTuple):
    """Tile of one program, and its launch options.

    rows: query rows, G per query. keys: keys per iteration. Both are powers of two from 16.
    num_warps, num_stages: Triton's launch options; num_stages is the number of key tiles in flight.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def choose_tile_config(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> TileConfig:
    """Tile sizes. Those for head_dim 64 and 128 were measured on an H200; the others fit in a program's registers."""
    if dtype == torch.float32:  # no tensor cores: small tiles, multiplied from registers
        return FLOAT32_TILES[head_dim]
    tiles = TILES[head_dim]
    # Before Hopper, tensor cores read keys from registers, which have room for fewer keys.
    return tiles if capability >= HOPPER else tiles._replace(keys=32)


FLOAT32_TILES = {
    32: TileConfig(32, 32, 4, 2),
    64: TileConfig(32, 32, 4, 2),
    128: TileConfig(16, 32, 8, 2),
    256: TileConfig(16, 16, 4, 1),
}
TILES = {
    32: TileConfig(128, 64, 4, 3),
    64: TileConfig(64, 64, 4, 3),
    128: TileConfig(64, 64, 4, 3),
    256: TileConfig(64, 32, 8, 2),
}


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float | None = None,
    *,
    max_seqlen_q: int,
    block_tables: torch.Tensor | None = None,
    tiles: TileConfig | None = None,
) -> torch.Tensor:
    """Causal attention of packed queries [T, H, D], which are the last tokens of their sequences.

    Returns a contiguous [T, H, D].
    key, value: packed [Tk, K, D] without block_tables; with them the caches [num_blocks, block_size, K, D], of which
    only the slots of cu_seqlens_k's keys are used. bfloat16, float16 or float32 (multiplied in full float32), one dtype
    for all three; last dimension contiguous, other strides arbitrary (so views of a packed qkv work).
    H a multiple of K; D in HEAD_DIMS; block_size a power of two from 16.
    cu_seqlens_q, cu_seqlens_k: [B + 1] int32, contiguous; a sequence has no more queries than keys; both may be 0.
    block_tables: [B, max_blocks] int32, last dimension contiguous; padding is not read.
    scale: D ** -0.5 unless given; above 0. max_seqlen_q: the most queries of a sequence.
    The grid depends on shapes and max_seqlen_q only. Equal inputs give bitwise equal outputs.
    Raises ValueError if shapes, dtypes, strides or scale violate these rules.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[-2]
    block_size = 0 if block_tables is None else key.shape[1]
    scale = 1 / sqrt(head_dim) if scale is None else scale
    _check(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, block_tables)
    if 0 in (num_tokens, max_seqlen_q, len(cu_seqlens_q) - 1):
        return torch.empty(query.shape, dtype=query.dtype, device=query.device)
    max_seqlen_k = max_seqlen_q if block_tables is None else block_tables.shape[1] * block_size
    if tiles is None and _is_for_hopper(query, key, value, max_seqlen_k):
        from nanovllm.kernels.varlen_attention_hopper import varlen_attention_hopper

        return varlen_attention_hopper(
            query, key, value, cu_seqlens_q, cu_seqlens_k, scale, max_seqlen_q=max_seqlen_q, block_tables=block_tables
        )
    if tiles is None:
        tiles = choose_tile_config(query.dtype, head_dim, _capability(query.device))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group_size = num_heads // num_kv_heads
    grid = (cdiv(max_seqlen_q * group_size, tiles.rows), num_kv_heads, len(cu_seqlens_q) - 1)
    launch(
        varlen_attention_kernel,
        grid,
        query, key, value, output, cu_seqlens_q, cu_seqlens_k, block_tables, scale * log2(e),
        *query.stride()[:2],
        0 if block_tables is None else key.stride(0),
        *key.stride()[-3:-1], *value.stride()[-3:-1], *output.stride()[:2],
        0 if block_tables is None else block_tables.stride(0),
        GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        ROWS=tiles.rows, KEYS=tiles.keys, MASKED_KEYS=min(tiles.keys, MAX_MASKED_KEYS),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return output


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU. For a device that is not a GPU, that of an H200."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else HOPPER


def _is_for_hopper(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, max_seqlen_k: int) -> bool:
    """Whether varlen_attention_hopper supports these inputs and is faster."""
    if query.device.type != "cuda" or query.shape[2] != 128 or max_seqlen_k < MIN_HOPPER_KEYS:
        return False
    if _capability(query.device) != HOPPER or not triton.__version__.startswith(GLUON_VERSIONS):
        return False
    from nanovllm.kernels.varlen_attention_hopper import takes

    return takes(query, key, value)


def _check(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, block_tables) -> None:
    """Raise ValueError if shapes, dtypes, strides or scale violate the rules of varlen_attention."""
    tables = [cu_seqlens_q, cu_seqlens_k]
    rules = {
        "query must be bfloat16, float16 or float32": query.dtype in DTYPES,
        "query, key and value must have one dtype": query.dtype == key.dtype == value.dtype,
        "key must have 3 dimensions, 4 with block_tables": key.dim() == (3 if block_tables is None else 4),
        "value must have the shape of key": value.shape == key.shape,
        f"head_dim must be one of {HEAD_DIMS}": query.shape[2] == key.shape[-1] in HEAD_DIMS,
        "the number of query heads must be a multiple of key's": query.shape[1] % key.shape[-2] == 0,
        "the last dimensions must be contiguous": query.stride(2) == key.stride(-1) == value.stride(-1) == 1,
        "cu_seqlens_q and cu_seqlens_k must be as long, and contiguous": cu_seqlens_q.shape == cu_seqlens_k.shape
        and cu_seqlens_q.is_contiguous()
        and cu_seqlens_k.is_contiguous(),
        "scale must be above 0": scale > 0,
    }
    if block_tables is not None:
        tables.append(block_tables)
        block_size = key.shape[1]
        rules[f"block_size must be a power of two from {MIN_BLOCK_SIZE}"] = (
            block_size >= MIN_BLOCK_SIZE and block_size & (block_size - 1) == 0
        )
        rules["the caches must have the same strides"] = key.stride() == value.stride()
        rules["block_tables must have a row a sequence, contiguous"] = (
            block_tables.shape[0] == len(cu_seqlens_q) - 1 and block_tables.stride(1) == 1
        )
    rules["cu_seqlens and block_tables must be int32"] = all(table.dtype == torch.int32 for table in tables)
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(
                f"{rule}; got query {_describe(query)}, key {_describe(key)}, value {_describe(value)}, "
                f"{', '.join(map(_describe, tables))} and scale {scale}"
            )


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} of strides {list(tensor.stride())}"


@triton.jit(do_not_specialize=["block_tables_stride"])
def varlen_attention_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, block_tables_ptr, scale_log2,
    query_token_stride, query_head_stride,
    block_stride, key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    output_token_stride, output_head_stride, block_tables_stride,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,  # 0: keys are packed
    ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED_KEYS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(2)
    kv_head = tl.program_id(1).to(tl.int64)
    q_start = tl.load(cu_seqlens_q_ptr + sequence).to(tl.int64)
    k_start = tl.load(cu_seqlens_k_ptr + sequence).to(tl.int64)
    q_len = (tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start).to(tl.int32)
    k_len = (tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start).to(tl.int32)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first_row >= q_len * GROUP_SIZE:
        return

    row = first_row + tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM)
    token = row // GROUP_SIZE
    head = kv_head * GROUP_SIZE + row % GROUP_SIZE
    is_row = (token < q_len)[:, None]
    query_offset = (q_start + token) * query_token_stride + head * query_head_stride
    query = tl.load(query_ptr + query_offset[:, None] + dim, mask=is_row, other=0.0)

    position = k_len - q_len + token
    last_token = tl.minimum(first_row + ROWS - 1, q_len * GROUP_SIZE - 1) // GROUP_SIZE
    num_keys = k_len - q_len + last_token + 1  # the number of keys that at least one row attends to
    # The number of keys that every row attends to, rounded down to whole tiles.
    num_unmasked = (k_len - q_len + first_row // GROUP_SIZE + 1) // KEYS * KEYS

    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    if BLOCK_SIZE:
        block_tables_ptr += sequence.to(tl.int64) * block_tables_stride
    else:
        key_ptr += k_start * key_token_stride
        value_ptr += k_start * value_token_stride
    source = (key_ptr, value_ptr, key_token_stride, value_token_stride, block_tables_ptr, block_stride)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for start in range(0, num_unmasked, KEYS):
        best, total, output = _attend_tile(
            query, best, total, output, position, start, num_keys, scale_log2, source, BLOCK_SIZE, KEYS, False
        )
    for start in range(num_unmasked, num_keys, MASKED_KEYS):
        best, total, output = _attend_tile(
            query, best, total, output, position, start, num_keys, scale_log2, source, BLOCK_SIZE, MASKED_KEYS, True
        )

    output /= total[:, None]
    output_offset = (q_start + token) * output_token_stride + head * output_head_stride
    tl.store(output_ptr + output_offset[:, None] + dim, output.to(output_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def _attend_tile(
    query,  # [ROWS, HEAD_DIM]
    best,  # [ROWS] the largest score so far, in units of log 2
    total,  # [ROWS] sum of 2 ** (score - best) so far
    output,  # [ROWS, HEAD_DIM] sum of 2 ** (score - best) * value so far
    position,  # [ROWS] index of the query among the sequence's keys
    start,  # the tile's first key
    num_keys,
    scale_log2,
    source,  # pointers and strides of the kv head's keys and values; packed keys start at the sequence
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """(best, total, output) after KEYS more keys."""
    key_ptr, value_ptr, key_token_stride, value_token_stride, block_table_ptr, block_stride = source
    dim = tl.arange(0, query.shape[1])
    index = tl.arange(0, KEYS)
    is_key = start + index < num_keys
    if BLOCK_SIZE == 0:
        key_ptr += tl.cast(start, tl.int64) * key_token_stride
        value_ptr += tl.cast(start, tl.int64) * value_token_stride
        key_offset = index * key_token_stride
        value_offset = index * value_token_stride
    elif BLOCK_SIZE % KEYS == 0:  # the tile lies in one block
        block = tl.load(block_table_ptr + start // BLOCK_SIZE).to(tl.int64)
        block_offset = block * block_stride + start % BLOCK_SIZE * key_token_stride
        key_ptr += block_offset
        value_ptr += block_offset
        key_offset = index * key_token_stride
        value_offset = key_offset
    else:
        # Entries of the table beyond the last key are arbitrary or do not exist.
        block = tl.load(block_table_ptr + (start + index) // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        key_offset = block * block_stride + index % BLOCK_SIZE * key_token_stride
        value_offset = key_offset
    # Keys are loaded as [HEAD_DIM, KEYS], with zeros beyond the last key: those slots may hold NaN, and a weight of 0
    # times NaN is NaN.
    if IS_MASKED:
        key = tl.load(key_ptr + key_offset[None, :] + dim[:, None], mask=is_key[None, :], other=0.0)
    else:
        key = tl.load(key_ptr + key_offset[None, :] + dim[:, None])
    score = tl.dot(query, key, input_precision="ieee")
    if IS_MASKED:
        score = tl.where((start + index)[None, :] <= position[:, None], score, float("-inf"))
    new_best = tl.maximum(best, tl.max(score, 1) * scale_log2)
    weight = tl.exp2(score * scale_log2 - new_best[:, None])
    correction = tl.exp2(best - new_best)
    if IS_MASKED:
        value = tl.load(value_ptr + value_offset[:, None] + dim[None, :], mask=is_key[:, None], other=0.0)
    else:
        value = tl.load(value_ptr + value_offset[:, None] + dim[None, :])
    total = total * correction + tl.sum(weight, 1)
    if value.dtype == tl.float32:  # sum each tile separately: large sums are rounded less often
        output = output * correction[:, None] + tl.dot(weight, value, input_precision="ieee")
    else:
        output = tl.dot(weight.to(value.dtype), value, output * correction[:, None])
    return new_best, total, output
