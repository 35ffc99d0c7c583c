"""varlen_attention on Hopper GPUs: the same function with Hopper's instructions, faster on long prompts.

The tensor cores never wait if loads, softmax and matrix products run at the same time. So the warps of a program have
roles, as in FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608):
    producer     4 warps with few registers: copies tiles of keys and values into a ring in shared memory. A tile is one
                 bulk copy (TMA), which takes the number of its first slot; or one a block, if blocks are smaller.
    2 consumers  4 warps each, for 64 of the program's 128 query rows each: multiply and take the softmax. While one
                 takes its softmax, the other has the tensor cores; and each starts the scores of the next tile before
                 it multiplies the weights of this one with its values.
They synchronise at barriers in shared memory, two for each place of the ring: `ready` completes when the copy is
complete, `free` when both consumers are done. A barrier's phase is a bit that flips whenever it completes: tile n is in
place n % STAGES, and is waited for with phase n // STAGES % 2.

Rows, letters and the order of keys are those of varlen_attention.py. Written in Gluon, Triton's language of explicit
layouts and barriers, which the interpreter does not support. It is one file although it is long, since a barrier is
understood only together with the code of all warps that use it.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Gluon's types are its compiler's, not Python's.

from math import e, log2

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanovllm.kernels.launching import cdiv, launch

ROWS = gl.constexpr(128)  # query rows of a program, half for each consumer
HALF = gl.constexpr(64)
HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
REGISTERS = 168  # of a thread, on average


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether varlen_attention_hopper supports these inputs, which varlen_attention's contract allows."""
    return (
        query.dtype in DTYPES
        and query.shape[2] in HEAD_DIMS
        and key.numel() > 0
        and _is_matrix_of_slots(key)
        and _is_matrix_of_slots(value)
    )


def _is_matrix_of_slots(tensor: torch.Tensor) -> bool:
    """Whether in [..., K, D] each slot's K * D elements are contiguous, with slots at equal multiples of 16 bytes."""
    *outer, token_stride, head_stride, _ = tensor.stride()
    return (
        head_stride == tensor.shape[-1]
        and all(stride == tensor.shape[1] * token_stride for stride in outer)
        and token_stride % 8 == 0
        and tensor.data_ptr() % 16 == 0
    )


def varlen_attention_hopper(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    *,
    max_seqlen_q: int,
    block_tables: torch.Tensor | None = None,
    keys: int = 128,
    num_stages: int = 2,
) -> torch.Tensor:
    """varlen_attention, with its contract, for inputs that it has checked and takes() accepts. Capability 9.0.

    keys: keys of a tile. num_stages: places of the ring.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key.shape[-2]
    block_size = 0 if block_tables is None else key.shape[1]
    copied_keys = min(block_size, keys) if block_size else keys
    # Registers of a thread of the 4 producer warps; the 8 consumer warps get the rest. Several copies a tile need more.
    producer_registers = 24 if copied_keys == keys else 40
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group_size = num_heads // num_kv_heads
    grid = (cdiv(max_seqlen_q * group_size, ROWS.value), num_kv_heads, len(cu_seqlens_q) - 1)
    launch(
        varlen_attention_hopper_kernel,
        grid,
        query, _descriptor(key, copied_keys), _descriptor(value, copied_keys), output, cu_seqlens_q, cu_seqlens_k,
        cu_seqlens_q if block_tables is None else block_tables,
        scale * log2(e),
        *query.stride()[:2], *output.stride()[:2], 0 if block_tables is None else block_tables.stride(0),
        GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        COPIED_KEYS=copied_keys, KEYS=keys, STAGES=num_stages,
        PRODUCER_REGISTERS=producer_registers, CONSUMER_REGISTERS=(3 * REGISTERS - producer_registers) // 2,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return output


def _descriptor(tensor: torch.Tensor, copied_keys: int) -> TensorDescriptor:
    """The matrix [num_slots, K * D] from which [copied_keys, D] are copied at a time."""
    num_slots, row_size = tensor.shape[:-2].numel(), tensor.shape[-2:].numel()
    layout = gl.NVMMASharedLayout.get_default_for([copied_keys, tensor.shape[-1]], DTYPES[tensor.dtype])
    strides = [tensor.stride(-3), 1]
    return TensorDescriptor(tensor, [num_slots, row_size], strides, [copied_keys, tensor.shape[-1]], layout)


@gluon.jit(do_not_specialize=["block_tables_stride"])
def varlen_attention_hopper_kernel(
    query_ptr, key_desc, value_desc, output_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, block_tables_ptr, scale_log2,
    query_token_stride, query_head_stride, output_token_stride, output_head_stride, block_tables_stride,
    GROUP_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,  # 0: keys are packed
    COPIED_KEYS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    sequence = gl.program_id(2)
    kv_head = gl.program_id(1)
    q_start = gl.load(cu_seqlens_q_ptr + sequence)
    k_start = gl.load(cu_seqlens_k_ptr + sequence)
    q_len = gl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    k_len = gl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
    first_row = (gl.num_programs(0) - 1 - gl.program_id(0)) * ROWS
    if first_row < q_len * GROUP_SIZE:
        last_token = gl.minimum(first_row + ROWS - 1, q_len * GROUP_SIZE - 1) // GROUP_SIZE
        num_tiles = (k_len - q_len + last_token + KEYS) // KEYS  # of keys that some row sees

        dtype: gl.constexpr = key_desc.dtype
        query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD_DIM], dtype)
        queries = gl.allocate_shared_memory(dtype, [2, HALF, HEAD_DIM], query_layout)
        keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], key_desc.layout)
        values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], value_desc.layout)
        key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        value_copied = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(key_ready.index(stage), count=1)
            mbarrier.init(value_ready.index(stage), count=1)
            mbarrier.init(key_free.index(stage), count=2)
            mbarrier.init(value_free.index(stage), count=2)
        mbarrier.init(value_copied, count=1)
        fence_async_shared()

        ring = (keys, values, key_ready, key_free, value_ready, value_free)
        rows = (kv_head, first_row, q_start, q_len, k_len, num_tiles)
        block_table_ptr = block_tables_ptr + sequence.to(gl.int64) * block_tables_stride
        source = (key_desc, value_desc, block_table_ptr, kv_head, k_start, k_len, num_tiles)
        tensors = (
            query_ptr, query_token_stride, query_head_stride,
            output_ptr, output_token_stride, output_head_stride,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_consume, (0, rows, ring, queries, tensors, scale_log2, GROUP_SIZE)),
                (_consume, (1, rows, ring, queries, tensors, scale_log2, GROUP_SIZE)),
                (_produce, (source, ring, value_copied, BLOCK_SIZE, COPIED_KEYS)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


# --- producer ---


@gluon.jit
def _produce(source, ring, value_copied, BLOCK_SIZE: gl.constexpr, COPIED_KEYS: gl.constexpr):
    key_desc, value_desc, block_table_ptr, kv_head, k_start, k_len, num_tiles = source
    keys, values, key_ready, key_free, value_ready, value_free = ring
    STAGES: gl.constexpr = keys.shape[0]
    KEYS: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    num_bytes: gl.constexpr = KEYS * HEAD_DIM * 2
    column = kv_head * HEAD_DIM
    for tile in range(num_tiles):
        start = tile * KEYS
        stage = tile % STAGES
        phase = tile // STAGES & 1
        # Passed at once at first: the phase before the first is complete.
        mbarrier.wait(key_free.index(stage), phase ^ 1)
        mbarrier.expect(key_ready.index(stage), num_bytes)
        _copy(key_desc, keys.index(stage), key_ready.index(stage), block_table_ptr, start, k_start, k_len, column,
              BLOCK_SIZE, COPIED_KEYS)  # fmt: skip
        mbarrier.wait(value_free.index(stage), phase ^ 1)
        if start + KEYS <= k_len:
            mbarrier.expect(value_ready.index(stage), num_bytes)
            _copy(value_desc, values.index(stage), value_ready.index(stage), block_table_ptr, start, k_start, k_len,
                  column, BLOCK_SIZE, COPIED_KEYS)  # fmt: skip
        else:  # the sequence's last tile
            mbarrier.expect(value_copied, num_bytes)
            _copy(value_desc, values.index(stage), value_copied, block_table_ptr, start, k_start, k_len,
                  column, BLOCK_SIZE, COPIED_KEYS)  # fmt: skip
            mbarrier.wait(value_copied, 0)
            _clear(values.index(stage), k_len - start)
            fence_async_shared()
            mbarrier.arrive(value_ready.index(stage), count=1)


@gluon.jit
def _copy(
    desc, tile, barrier, block_table_ptr, start, k_start, k_len, column,
    BLOCK_SIZE: gl.constexpr, COPIED_KEYS: gl.constexpr,
):  # fmt: skip
    """Start copying keys start, start + 1, ... of a sequence to `tile`; barrier completes when all have arrived."""
    for part in gl.static_range(tile.shape[0] // COPIED_KEYS):
        key = start + part * COPIED_KEYS
        if BLOCK_SIZE == 0:
            slot = k_start + key
        else:  # beyond the last key the table may end: a slot outside the cache, for which zeros arrive
            block = gl.load(block_table_ptr + key // BLOCK_SIZE, mask=key < k_len, other=-1)
            slot = block * BLOCK_SIZE + key % BLOCK_SIZE
        if tile.shape[0] == COPIED_KEYS:
            tma.async_copy_global_to_shared(desc, [slot, column], barrier, tile)
        else:
            tma.async_copy_global_to_shared(desc, [slot, column], barrier, tile.slice(part * COPIED_KEYS, COPIED_KEYS))


@gluon.jit
def _clear(tile, num_keys):
    """Zero the rows of a tile from num_keys on: their weight is 0, but they may hold NaN."""
    HEAD_DIM: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    for part in gl.static_range(tile.shape[0] // 16):
        if part * 16 + 16 > num_keys:
            rows = tile.slice(part * 16, 16)
            key = part * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
            value = rows.load(layout)
            rows.store(gl.where((key < num_keys)[:, None], value, gl.zeros_like(value)))


# --- consumers ---


@gluon.jit
def _consume(WHICH: gl.constexpr, rows, ring, queries, tensors, scale_log2, GROUP_SIZE: gl.constexpr):
    kv_head, first_row, q_start, q_len, k_len, num_tiles = rows
    keys, values, key_ready, key_free, value_ready, _ = ring
    query_ptr, query_token_stride, query_head_stride, output_ptr, output_token_stride, output_head_stride = tensors
    dtype: gl.constexpr = keys.dtype
    STAGES: gl.constexpr = keys.shape[0]
    KEYS: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    output_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, output_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    memory_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])

    my_row = first_row + WHICH * HALF
    offset, is_row = _row_offsets(my_row, q_start, q_len, kv_head, query_token_stride, query_head_stride, GROUP_SIZE,
                                  HEAD_DIM, memory_layout)  # fmt: skip
    query = queries.index(WHICH)
    query.store(gl.load(query_ptr + offset, mask=is_row, other=0.0))
    fence_async_shared()

    position = k_len - q_len + (my_row + gl.arange(0, HALF, layout=row_layout)) // GROUP_SIZE
    num_unmasked = (k_len - q_len + my_row // GROUP_SIZE + 1) // KEYS  # tiles of which every row sees all
    num_unmasked = gl.minimum(gl.maximum(num_unmasked, 1), num_tiles)  # less the first, which is masked in any case
    zeros = gl.zeros([HALF, KEYS], gl.float32, layout=score_layout)
    best = gl.full([HALF], float("-inf"), gl.float32, layout=row_layout)
    total = gl.zeros([HALF], gl.float32, layout=row_layout)
    output = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=output_layout)

    mbarrier.wait(key_ready.index(0), 0)
    score = warpgroup_mma(query, keys.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(key_free.index(0), count=1)
    weight, best, total, _ = _softmax(score, best, total, scale_log2, position, 0, True)
    weight = gl.convert_layout(weight.to(dtype), weight_layout)
    for tile in range(1, num_unmasked):
        weight, best, total, output = _attend_tile(tile, ring, query, zeros, weight, best, total, output, scale_log2,
                                                   position, False)  # fmt: skip
    for tile in range(num_unmasked, num_tiles):
        weight, best, total, output = _attend_tile(tile, ring, query, zeros, weight, best, total, output, scale_log2,
                                                   position, True)  # fmt: skip
    last = num_tiles - 1
    mbarrier.wait(value_ready.index(last % STAGES), last // STAGES & 1)
    output = warpgroup_mma(weight, values.index(last % STAGES), output, is_async=True)
    output, weight = warpgroup_mma_wait(0, deps=[output, weight])

    output = output * gl.convert_layout(1.0 / total, gl.SliceLayout(1, output_layout))[:, None]
    query.store(output.to(dtype))  # through shared memory, so that whole rows are written
    offset, is_row = _row_offsets(my_row, q_start, q_len, kv_head, output_token_stride, output_head_stride, GROUP_SIZE,
                                  HEAD_DIM, memory_layout)  # fmt: skip
    gl.store(output_ptr + offset, query.load(memory_layout), mask=is_row)


@gluon.jit
def _attend_tile(tile, ring, query, zeros, weight, best, total, output, scale_log2, position, IS_MASKED: gl.constexpr):
    """(weight, best, total, output): the weights of `tile`, and output with the values of the tile before it added.

    The tensor cores multiply the previous tile's `weight` with its values while this tile's softmax is computed.
    """
    keys, values, key_ready, key_free, value_ready, value_free = ring
    STAGES: gl.constexpr = keys.shape[0]
    KEYS: gl.constexpr = keys.shape[1]
    stage = tile % STAGES
    stage_before = (tile - 1) % STAGES
    mbarrier.wait(key_ready.index(stage), tile // STAGES & 1)
    score = warpgroup_mma(query, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(value_ready.index(stage_before), (tile - 1) // STAGES & 1)
    output = warpgroup_mma(weight, values.index(stage_before), output, is_async=True)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(key_free.index(stage), count=1)
    next_weight, best, total, correction = _softmax(score, best, total, scale_log2, position, tile * KEYS, IS_MASKED)
    output, weight = warpgroup_mma_wait(0, deps=[output, weight])
    mbarrier.arrive(value_free.index(stage_before), count=1)
    output = output * gl.convert_layout(correction, gl.SliceLayout(1, output.type.layout))[:, None]
    return gl.convert_layout(next_weight.to(keys.dtype), weight.type.layout), best, total, output


@gluon.jit
def _softmax(score, best, total, scale_log2, position, start, IS_MASKED: gl.constexpr):
    """(weight, best, total, correction) of one more tile: weight = 2 ** (score - best); the earlier output must be
    multiplied by `correction`."""
    if IS_MASKED:
        key = start + gl.arange(0, score.shape[1], layout=gl.SliceLayout(0, score.type.layout))
        score = gl.where(key[None, :] <= position[:, None], score, float("-inf"))
    new_best = gl.maximum(best, gl.max(score, 1) * scale_log2)
    weight = gl.exp2(score * scale_log2 - new_best[:, None])
    correction = gl.exp2(best - new_best)
    return weight, new_best, total * correction + gl.sum(weight, 1), correction


@gluon.jit
def _row_offsets(
    first_row, q_start, q_len, kv_head, token_stride, head_stride,
    GROUP_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """(offsets [HALF, HEAD_DIM] of rows in a tensor [T, H, D], whether each row exists [HALF, 1])."""
    row = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    token = row // GROUP_SIZE
    head = kv_head * GROUP_SIZE + row % GROUP_SIZE
    offset = (q_start + token).to(gl.int64) * token_stride + head.to(gl.int64) * head_stride
    return offset[:, None] + dim[None, :], (token < q_len)[:, None]
