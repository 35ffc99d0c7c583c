"""shared_prefix_attention: the attention of many sequences to the keys that they share, which are read once.

A tile of sequences has the same first keys. One program a (tile, kv head, split of the shared keys, part of the queries
of the tile) multiplies the keys that it reads with all its queries. paged_attention then continues with each sequence's
own keys, from the running softmax that this kernel leaves. (Juravsky et al. 2024, arXiv 2402.05099; FlashInfer and vLLM
call it cascade attention.)

Letters: B sequences, H query heads, K kv heads, D head_dim.
"""

from math import e, log2

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launching import launch, next_power_of_2
from nanovllm.kernels.paged_attention import SharedPrefixPart, num_multiprocessors
from nanovllm.kernels.paged_softmax import attend_to_paged_keys, load_blocks

SEQS_PER_TILE = 32
MAX_SPLITS = 8


def shared_prefix_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    sequence_order: torch.Tensor,
    shared_lens: torch.Tensor,
    scale: float | None = None,
    *,
    seqs_per_tile: int = SEQS_PER_TILE,
    num_splits: int | None = None,
    tile_size: int | None = None,
) -> SharedPrefixPart:
    """The attention of one query a sequence to its first shared_lens[b] cached keys, for paged_attention.

    query, k_cache, v_cache, block_tables, scale: as in paged_attention.
    sequence_order: [B] int32, a permutation. Each seqs_per_tile sequences that follow each other in it are a tile: they
        have equal shared_lens, and their block tables begin with the same shared_lens / block_size blocks.
    shared_lens: [B] int32, multiples of the block size. Where it is 0, no key is read and nothing is written.
    num_splits: into how many parts the shared keys are split. tile_size: how many keys a program loads at once.

    What is launched depends on shapes and strides only, so a CUDA graph may hold it.
    Raises ValueError for an order or lengths of another shape or dtype; paged_attention checks the other arguments.
    """
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    for name, tensor in (("sequence_order", sequence_order), ("shared_lens", shared_lens)):
        if tensor.shape != (num_seqs,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be [{num_seqs}], contiguous, int32, got {list(tensor.shape)} {tensor.dtype} of strides "
                f"{tensor.stride()}"
            )
    group_size = num_heads // num_kv_heads
    is_wide = query.element_size() == 4  # computed in float64
    rows = int(min(32 if is_wide else 64, next_power_of_2(seqs_per_tile * group_size)))
    num_parts = -(-seqs_per_tile * group_size // max(16, rows))
    grid = (num_kv_heads * num_parts, -(-num_seqs // seqs_per_tile))
    if num_splits is None:
        num_splits = max(1, min(MAX_SPLITS, num_multiprocessors(query.device) // max(1, grid[0] * grid[1])))
    if tile_size is None:
        tile_size = 16 if is_wide else 64 if head_dim <= 128 else 32
    wide = torch.float64 if is_wide else torch.float32
    out = torch.empty(num_seqs, num_heads, num_splits, head_dim, dtype=wide, device=query.device)
    lse = torch.empty(num_seqs, num_heads, num_splits, dtype=wide, device=query.device)
    part = SharedPrefixPart(shared_lens, out, lse, tile_size)
    if num_seqs == 0:
        return part
    launch(
        shared_prefix_attention_kernel,
        (grid[0], num_splits, grid[1]),
        query, k_cache, v_cache, block_tables, sequence_order, shared_lens, out, lse,
        (head_dim**-0.5 if scale is None else scale) * log2(e), num_seqs,
        *query.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0),
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, GROUP_SIZE=group_size, SEQS_PER_TILE=seqs_per_tile,
        ROWS=max(16, rows), TILE_SIZE=tile_size,
        num_warps=8 if is_wide or seqs_per_tile * group_size > rows else 4, num_stages=2 if is_wide else 3,
    )  # fmt: skip
    return part


@triton.jit(do_not_specialize=["table_stride", "num_seqs"])
def shared_prefix_attention_kernel(
    query_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, sequence_order_ptr, shared_lens_ptr, out_ptr,
    lse_ptr, scale_log2_e, num_seqs,
    query_seq_stride, query_head_stride, k_block_stride, k_slot_stride, k_head_stride, v_block_stride,
    v_slot_stride, v_head_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_SIZE: tl.constexpr, SEQS_PER_TILE: tl.constexpr,
    ROWS: tl.constexpr, TILE_SIZE: tl.constexpr,
):  # fmt: skip
    NUM_PARTS: tl.constexpr = (SEQS_PER_TILE * GROUP_SIZE + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) // NUM_PARTS
    split = tl.program_id(1)
    first = tl.program_id(2) * SEQS_PER_TILE
    first_seq = tl.load(sequence_order_ptr + first).to(tl.int64)
    shared_len = tl.load(shared_lens_ptr + first_seq)
    split_len = tl.cdiv(tl.cdiv(shared_len, TILE_SIZE), tl.num_programs(1)) * TILE_SIZE
    start = split * split_len
    end = tl.minimum(start + split_len, shared_len)
    if start < end:
        row = tl.program_id(0) % NUM_PARTS * ROWS + tl.arange(0, ROWS)
        dim = tl.arange(0, HEAD_DIM)
        place = first + row // GROUP_SIZE
        in_tile = (row < SEQS_PER_TILE * GROUP_SIZE) & (place < num_seqs)
        seq = tl.load(sequence_order_ptr + place, mask=in_tile, other=0).to(tl.int64)
        head = kv_head * GROUP_SIZE + row % GROUP_SIZE
        query_row = seq * query_seq_stride + head * query_head_stride
        query = tl.load(query_ptr + query_row[:, None] + dim[None, :], mask=in_tile[:, None], other=0.0)
        summed: tl.constexpr = tl.float64 if query.dtype == tl.float32 else tl.float32
        table_ptr = block_tables_ptr + first_seq * table_stride
        highest, total, accumulator = attend_to_paged_keys(
            query,
            k_cache_ptr + kv_head.to(tl.int64) * k_head_stride + dim[None, :],
            v_cache_ptr + kv_head.to(tl.int64) * v_head_stride + dim[None, :],
            table_ptr,
            load_blocks(table_ptr, start, end, BLOCK_SIZE, TILE_SIZE),
            start,
            end,
            scale_log2_e,
            k_block_stride,
            k_slot_stride,
            v_block_stride,
            v_slot_stride,
            tl.full([ROWS], float("-inf"), summed),
            tl.zeros([ROWS], summed),
            tl.zeros([ROWS, HEAD_DIM], summed),
            BLOCK_SIZE,
            TILE_SIZE,
        )
        part = (seq * (tl.num_programs(0) // NUM_PARTS * GROUP_SIZE) + head) * tl.num_programs(1) + split
        out = accumulator / total[:, None]
        tl.store(out_ptr + part[:, None] * HEAD_DIM + dim[None, :], out, mask=in_tile[:, None])
        tl.store(lse_ptr + part, highest + tl.log2(total), mask=in_tile)
