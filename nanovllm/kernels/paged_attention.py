"""paged_attention: one query for each sequence attends to the sequence's keys and values in the paged cache.

There is a program for each (sequence, kv head, split of the keys). It reads each key and value once, for all query
heads that share them (Ainslie et al. 2023, arXiv 2305.13245), and keeps a running softmax (Milakov and Gimelshein 2018,
arXiv 1805.02867). If the sequences do not fill the GPU, their keys are split, and a second kernel combines the results
of the splits (flash-decoding, Dao et al. 2023).

Letters: B sequences, H query heads, K kv heads, D head_dim. Over 300 lines in one file, because both kernels must agree
on how the keys are split.
"""

from functools import cache
from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels import DTYPES, HEAD_DIMS, MIN_BLOCK_SIZE
from nanovllm.kernels.early_launch import can_launch_early
from nanovllm.kernels.launching import launch, next_power_of_2
from nanovllm.kernels.paged_softmax import attend_to_paged_keys, load_blocks

DIMS_TO_COMBINE = 32


class TileConfig(NamedTuple):
    """A program loads the keys and values of tile_size tokens at once; num_stages - 1 tiles are in flight."""

    tile_size: int
    num_warps: int
    num_stages: int


class SharedPrefixPart(NamedTuple):
    """The result of shared_prefix_attention, in up to num_splits parts of the shared keys.

    lens: [B] int32, how many of each sequence's first keys it covers, 0 for none.
    out: [B, H, num_splits, D], lse: [B, H, num_splits], each part's output and log2 of the sum of its weights, float32
        (float64 of a float32 query). Parts without keys are not written.
    tile_size: the number of keys of a part is a multiple of it.
    """

    lens: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    tile_size: int


def paged_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float | None = None,
    *,
    out: torch.Tensor | None = None,
    sequence_order: torch.Tensor | None = None,
    num_splits: int | None = None,
    tiles: TileConfig | None = None,
    starts_early: bool | None = None,
    shared_prefix: SharedPrefixPart | None = None,
) -> torch.Tensor:
    """Attention [B, H, D] of one query a sequence to its first context_lens[b] cached keys; zeros if there are none.

    query: [B, H, D], float32, float16 or bfloat16; D is 32, 64, 128 or 256.
    k_cache, v_cache: [num_blocks, block_size, K, D] of query's dtype, H a multiple of K, block_size a power of two
        from 16. Only the slots that the tables name below context_lens are read.
    block_tables: [B, max_blocks] int32; entries beyond a sequence's blocks are not read.
    context_lens: [B] int32, at most max_blocks * block_size each. scale: D ** -0.5 unless given.
    out: [B, H, D], written and returned if given. Last dimensions must be contiguous, other strides may be any.
    sequence_order: [B] int32, a permutation: the order of starting. Longest first is fastest; the result is the same.
    num_splits: the number of parts that each sequence's keys are split into. tiles: see TileConfig.
    starts_early: programmatic dependent launch: the kernels start before the preceding kernels end, and wait for them
        after reading block_tables, context_lens and sequence_order, which the preceding kernel must not write. By
        default if keys are split and the GPU supports it; unsplit, long sequences would share a multiprocessor.
    shared_prefix: the attention to each sequence's first keys, which shared_prefix_attention computed. Only the keys
        after them are read, and split.

    The result is deterministic. What is launched depends on shapes and strides only, so a CUDA graph may hold it.
    Raises ValueError for other shapes, strides and dtypes.
    """
    _check(query, k_cache, v_cache, block_tables, context_lens, sequence_order, out)
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_seqs == 0:
        return out
    if num_splits is None:
        max_context_len = block_tables.shape[1] * block_size
        num_splits = choose_num_splits(num_seqs, num_kv_heads, max_context_len, num_multiprocessors(query.device))
    is_split = num_splits > 1
    if tiles is None:
        tiles = choose_tile_config(head_dim, query.element_size(), is_split)
    if starts_early is None:
        starts_early = is_split and can_launch_early(query.device)
    partial_out, partial_lse = out, None
    if is_split:
        wide = torch.float64 if query.dtype == torch.float32 else torch.float32
        partial_out = torch.empty(num_seqs, num_heads, num_splits, head_dim, dtype=wide, device=query.device)
        partial_lse = torch.empty(num_seqs, num_heads, num_splits, dtype=wide, device=query.device)
    group_size = num_heads // num_kv_heads
    launch(
        paged_attention_kernel,
        (num_kv_heads, num_splits, num_seqs),
        query, k_cache, v_cache, block_tables, context_lens, sequence_order, out, partial_out, partial_lse,
        None if shared_prefix is None else shared_prefix.lens,
        None if shared_prefix is None else shared_prefix.out,
        None if shared_prefix is None else shared_prefix.lse,
        (head_dim**-0.5 if scale is None else scale) * log2(e),
        *query.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0),
        *out.stride()[:2],
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, GROUP_SIZE=group_size,
        ROWS=max(16, next_power_of_2(group_size)), TILE_SIZE=tiles.tile_size,
        SHARED_SPLITS=0 if shared_prefix is None else shared_prefix.lse.shape[2],
        SHARED_TILE_SIZE=0 if shared_prefix is None else shared_prefix.tile_size, STARTS_EARLY=starts_early,
        launch_pdl=starts_early, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if is_split:
        launch(
            combine_splits_kernel,
            (head_dim // DIMS_TO_COMBINE, num_heads, num_seqs),
            partial_out, partial_lse, context_lens, None if shared_prefix is None else shared_prefix.lens, out,
            *out.stride()[:2], num_splits,
            HEAD_DIM=head_dim, DIMS=DIMS_TO_COMBINE, TILE_SIZE=tiles.tile_size,
            SPLITS_AT_ONCE=min(64, next_power_of_2(num_splits)), STARTS_EARLY=starts_early,
            launch_pdl=starts_early, num_warps=4,
        )  # fmt: skip
    return out


def choose_tile_config(head_dim: int, element_size: int, is_split: bool) -> TileConfig:
    """Large tiles keep more loads in flight, small ones start sooner; float32, computed in float64, has small ones.

    Unsplit, two tiles in flight leave room for a third program on a multiprocessor of an H200: sequences of different
    lengths then end more evenly than with three tiles in flight in two programs.
    """
    if element_size == 4:
        return TileConfig(tile_size=16, num_warps=4, num_stages=2)
    if is_split:
        return TileConfig(tile_size=32, num_warps=2, num_stages=3)
    return TileConfig(tile_size=64 if head_dim <= 128 else 32, num_warps=4, num_stages=3)


def choose_num_splits(num_seqs: int, num_kv_heads: int, max_context_len: int, num_sms: int) -> int:
    """Two programs for each multiprocessor, but at least 32 keys for each split of the longest sequence."""
    return max(1, min(2 * num_sms // (num_seqs * num_kv_heads), -(-max_context_len // 32)))


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; for other devices, on which kernels are interpreted or only compiled, of an H200."""
    return _properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def _check(query, k_cache, v_cache, block_tables, context_lens, sequence_order, out) -> None:
    """Raise ValueError for shapes, strides and dtypes that paged_attention's contract excludes."""
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    integers = [block_tables, context_lens] + ([] if sequence_order is None else [sequence_order])
    tensors = [query, k_cache, v_cache, *integers] + ([] if out is None else [out])
    rules = {
        f"head_dim must be one of {HEAD_DIMS}": head_dim in HEAD_DIMS,
        "k_cache and v_cache must have one shape and query's head_dim": k_cache.shape == v_cache.shape
        and k_cache.shape[3] == head_dim,
        "query, k_cache and v_cache must have one dtype": query.dtype == k_cache.dtype == v_cache.dtype,
        "query must be float32, float16 or bfloat16": query.dtype in DTYPES,
        f"block_size must be a power of two from {MIN_BLOCK_SIZE}": block_size >= MIN_BLOCK_SIZE
        and block_size & (block_size - 1) == 0,
        "the number of query heads must be a multiple of k_cache's": num_heads % num_kv_heads == 0,
        "block_tables and context_lens must have a row a query": len(block_tables) == num_seqs
        and block_tables.dim() == 2
        and context_lens.shape == (num_seqs,),
        "sequence_order must be as long as context_lens": sequence_order is None or sequence_order.shape == (num_seqs,),
        "block_tables, context_lens and sequence_order must be int32": {tensor.dtype for tensor in integers}
        == {torch.int32},
        "out must have query's shape and dtype": out is None or (out.shape, out.dtype) == (query.shape, query.dtype),
        "last dimensions must be contiguous": all(tensor.stride(-1) == 1 or tensor.shape[-1] < 2 for tensor in tensors),
    }
    for rule, holds in rules.items():
        if not holds:
            got = ", ".join(f"{list(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}" for tensor in tensors)
            raise ValueError(f"{rule}; got {got}")


@triton.jit(do_not_specialize=["table_stride"])
def paged_attention_kernel(
    query_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, context_lens_ptr,
    sequence_order_ptr,  # or None
    out_ptr, partial_out_ptr,
    partial_lse_ptr,  # or None: not split
    shared_lens_ptr,  # or None: no shared prefix
    shared_out_ptr, shared_lse_ptr, scale_log2_e,
    query_seq_stride, query_head_stride, k_block_stride, k_slot_stride, k_head_stride, v_block_stride,
    v_slot_stride, v_head_stride, table_stride, out_seq_stride, out_head_stride,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr,
    TILE_SIZE: tl.constexpr, SHARED_SPLITS: tl.constexpr, SHARED_TILE_SIZE: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    # The kv head is the fastest axis: programs that run together read the heads of one token, which are neighbours.
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    if sequence_order_ptr is not None:
        seq = tl.load(sequence_order_ptr + seq)
    context_len = tl.load(context_lens_ptr + seq)
    shared_len = 0
    if shared_lens_ptr is not None:
        shared_len = tl.load(shared_lens_ptr + seq)
    split_len = tl.cdiv(tl.cdiv(context_len - shared_len, TILE_SIZE), tl.num_programs(1)) * TILE_SIZE
    start = shared_len + split * split_len
    end = tl.minimum(start + split_len, context_len)
    seq = seq.to(tl.int64)  # int64: products with strides exceed 2**31 on large GPUs
    table_ptr = block_tables_ptr + seq * table_stride
    first_block = load_blocks(table_ptr, start, end, BLOCK_SIZE, TILE_SIZE)
    if STARTS_EARLY:
        gdc_wait()  # for the query and the newest key and value; the host wrote what is read above
        gdc_launch_dependents()
    if (start < end) | (split == 0):  # the first writes zeros if there are no keys
        row = tl.arange(0, ROWS)  # the query heads of the group, padded for tl.dot
        dim = tl.arange(0, HEAD_DIM)
        in_group = row < GROUP_SIZE
        head = kv_head * GROUP_SIZE + row
        query = tl.load(
            query_ptr + seq * query_seq_stride + head[:, None] * query_head_stride + dim[None, :],
            mask=in_group[:, None],
            other=0.0,
        )
        summed: tl.constexpr = tl.float64 if query.dtype == tl.float32 else tl.float32
        k_ptr = k_cache_ptr + kv_head.to(tl.int64) * k_head_stride + dim[None, :]
        v_ptr = v_cache_ptr + kv_head.to(tl.int64) * v_head_stride + dim[None, :]

        highest = tl.full([ROWS], float("-inf"), summed)  # score so far, times log2(e)
        total = tl.zeros([ROWS], summed)  # of the weights, relative to 2**highest
        accumulator = tl.zeros([ROWS, HEAD_DIM], summed)
        if shared_lens_ptr is not None:  # noqa: SIM102 (Triton decides this one when it compiles)
            if (shared_len > 0) & (split == 0):  # the running softmax continues that of the shared prefix
                shared_split_len = tl.cdiv(tl.cdiv(shared_len, SHARED_TILE_SIZE), SHARED_SPLITS) * SHARED_TILE_SIZE
                first_part = (seq * tl.num_programs(0) * GROUP_SIZE + head) * SHARED_SPLITS
                for index in range(0, tl.cdiv(shared_len, shared_split_len)):
                    part = first_part + index
                    lse = tl.load(shared_lse_ptr + part, mask=in_group, other=0.0)
                    part_ptr = shared_out_ptr + part[:, None] * HEAD_DIM + dim[None, :]
                    part_out = tl.load(part_ptr, mask=in_group[:, None], other=0.0)
                    new_highest = tl.maximum(highest, lse)
                    weight, decay = tl.exp2(lse - new_highest), tl.exp2(highest - new_highest)
                    total = total * decay + weight
                    accumulator = accumulator * decay[:, None] + part_out * weight[:, None]
                    highest = new_highest
        highest, total, accumulator = attend_to_paged_keys(
            query,
            k_ptr,
            v_ptr,
            table_ptr,
            first_block,
            start,
            end,
            scale_log2_e,
            k_block_stride,
            k_slot_stride,
            v_block_stride,
            v_slot_stride,
            highest,
            total,
            accumulator,
            BLOCK_SIZE,
            TILE_SIZE,
        )

        is_whole = split_len >= context_len - shared_len
        result = accumulator / tl.where(total > 0, total, 1.0)[:, None]
        if partial_lse_ptr is not None and not is_whole:
            part = (seq * tl.num_programs(0) * GROUP_SIZE + head) * tl.num_programs(1) + split
            tl.store(partial_out_ptr + part[:, None] * HEAD_DIM + dim[None, :], result, mask=in_group[:, None])
            tl.store(partial_lse_ptr + part, highest + tl.log2(total), mask=in_group)
        else:
            out_row = seq * out_seq_stride + head * out_head_stride
            tl.store(
                out_ptr + out_row[:, None] + dim[None, :],
                result.to(out_ptr.dtype.element_ty),
                mask=in_group[:, None],
            )


@triton.jit(do_not_specialize=["num_splits"])
def combine_splits_kernel(
    partial_out_ptr, partial_lse_ptr, context_lens_ptr,
    shared_lens_ptr,  # or None
    out_ptr,
    out_seq_stride, out_head_stride, num_splits,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, TILE_SIZE: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out = the mean of partial_out weighted by 2**partial_lse, over the splits that had keys; DIMS of a head each."""
    dim = tl.program_id(0) * DIMS + tl.arange(0, DIMS)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    context_len = tl.load(context_lens_ptr + seq)
    if shared_lens_ptr is not None:
        context_len -= tl.load(shared_lens_ptr + seq)
    split_len = tl.cdiv(tl.cdiv(context_len, TILE_SIZE), num_splits) * TILE_SIZE  # as in paged_attention_kernel
    seq = seq.to(tl.int64)
    if STARTS_EARLY:
        gdc_wait()  # for the parts
        gdc_launch_dependents()
    if split_len < context_len:  # else one split had all keys and wrote out itself
        num_used = tl.cdiv(context_len, split_len)
        first_part = (seq * tl.num_programs(1) + head) * num_splits
        highest = tl.full([], float("-inf"), partial_lse_ptr.dtype.element_ty)
        total = tl.zeros([], partial_lse_ptr.dtype.element_ty)
        accumulator = tl.zeros([DIMS], partial_lse_ptr.dtype.element_ty)
        for first in range(0, num_used, SPLITS_AT_ONCE):
            split = first + tl.arange(0, SPLITS_AT_ONCE)
            is_used = split < num_used
            part = first_part + split
            lse = tl.load(partial_lse_ptr + part, mask=is_used, other=float("-inf"))
            partial_ptr = partial_out_ptr + part[:, None] * HEAD_DIM + dim[None, :]
            partial_out = tl.load(partial_ptr, mask=is_used[:, None], other=0.0)
            new_highest = tl.maximum(highest, tl.max(lse, axis=0))
            weight = tl.exp2(lse - new_highest)
            decay = tl.exp2(highest - new_highest)
            total = total * decay + tl.sum(weight, axis=0)
            accumulator = accumulator * decay + tl.sum(partial_out * weight[:, None], axis=0)
            highest = new_highest
        out_row = seq * out_seq_stride + head * out_head_stride
        tl.store(out_ptr + out_row + dim, (accumulator / total).to(out_ptr.dtype.element_ty))
