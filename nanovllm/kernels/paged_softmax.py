"""attend_to_paged_keys and load_blocks: the loop that the kernels of decode attention share."""

# pyright: reportAssignmentType=false
# (Triton's types do not know tl.constexpr annotations.)

import triton
import triton.language as tl


@triton.jit
def attend_to_paged_keys(
    query, k_ptr, v_ptr, table_ptr, first_block, start, end, scale_log2_e,
    k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
    highest, total, accumulator,
    BLOCK_SIZE: tl.constexpr, TILE_SIZE: tl.constexpr,
):  # fmt: skip
    """The running softmax (highest, total, accumulator), continued over the keys of positions start .. end - 1.

    query: [ROWS, D]. k_ptr, v_ptr: [1, D] pointers to slot 0 of block 0 of one kv head. table_ptr: the sequence's row
    of the block table. first_block: load_blocks at start, which a multiple of the smaller of TILE_SIZE and BLOCK_SIZE
    must be, both powers of two.
    highest: [ROWS], the largest score so far, times log2(e). total: [ROWS], the sum of the weights, relative to
    2**highest. accumulator: [ROWS, D], the sum of the weighted values.
    """
    # float32 inputs are summed in float64: tl.dot adds product after product, whose error over long heads and contexts
    # is far larger than that of the partial sums of a matrix library.
    multiplied: tl.constexpr = tl.float64 if query.dtype == tl.float32 else query.dtype
    summed: tl.constexpr = tl.float64 if query.dtype == tl.float32 else tl.float32
    token = tl.arange(0, TILE_SIZE)
    next_block = first_block
    for position in range(start, end, TILE_SIZE):
        in_range = position + token < end
        block = next_block.to(tl.int64)
        # The blocks are loaded one tile ahead, so that the loads of keys and values need not wait for them.
        next_block = load_blocks(table_ptr, position + TILE_SIZE, end, BLOCK_SIZE, TILE_SIZE)
        if TILE_SIZE <= BLOCK_SIZE:  # a tile lies in one block; the rest is a number and needs no registers
            slot = position % BLOCK_SIZE + token
        else:
            slot = (position + token) % BLOCK_SIZE
        # A slot beyond the context may hold NaN, and 0 * NaN is NaN: it is not read.
        k_row = block * k_block_stride + slot * k_slot_stride
        key = tl.load(k_ptr + k_row[:, None], mask=in_range[:, None], other=0.0)
        v_row = block * v_block_stride + slot * v_slot_stride
        value = tl.load(v_ptr + v_row[:, None], mask=in_range[:, None], other=0.0)

        score = tl.dot(query.to(multiplied), tl.trans(key.to(multiplied)), out_dtype=summed) * scale_log2_e
        score = tl.where(in_range[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        weight = tl.exp2(score - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weight, axis=1)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weight.to(multiplied), value.to(multiplied), accumulator, out_dtype=summed)
        highest = new_highest
    return highest, total, accumulator


@triton.jit
def load_blocks(table_ptr, position, end, BLOCK_SIZE: tl.constexpr, TILE_SIZE: tl.constexpr):
    """The block of the tile that begins at `position`, or of each of its tokens if a tile is larger than a block."""
    if TILE_SIZE <= BLOCK_SIZE:
        return tl.load(table_ptr + position // BLOCK_SIZE, mask=position < end, other=0)
    else:
        token = position + tl.arange(0, TILE_SIZE)
        return tl.load(table_ptr + token // BLOCK_SIZE, mask=token < end, other=0)
