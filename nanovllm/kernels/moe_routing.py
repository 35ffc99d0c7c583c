"""moe_routing: the experts of each token, their weights, and the order of the tokens of each expert.

An assignment is one of a token's top_k choices; its number is token * top_k + choice. Sorted by expert, assignments
fill blocks of block_size rows; all rows of a block belong to one expert, and an expert's last block is padded. So one
grid of equal programs multiplies all experts (kernels.grouped_gemm). The host does not wait for the device, and no size
depends on the choices, so a CUDA graph can record it. reference.moe says what is computed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels import DTYPES
from nanovllm.kernels.launching import cdiv, launch, next_power_of_2

TILE_SIZE = 1024  # logits that one program of the first launch reads
CHUNK_SIZE = 4096  # assignments that one step of the second launch reads


class Routing(NamedTuple):
    """T tokens' assignments, A = T * top_k of them.

    weights: [T, top_k] float32. experts: [T, top_k] int32, the most probable first.
    sorted_assignments: [max_num_blocks * block_size] int32; a padding row of a block holds A.
    block_experts: [max_num_blocks] int32. num_blocks: [1] int32; blocks from there on are not written.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    sorted_assignments: torch.Tensor
    block_experts: torch.Tensor
    num_blocks: torch.Tensor
    block_size: int


def max_num_blocks(num_assignments: int, num_experts: int, block_size: int) -> int:
    """The largest possible number of blocks: every expert with an assignment begins one, and the others fill blocks.

    >>> max_num_blocks(9, 4, 4)  # 6, 1, 1 and 1 assignments
    5
    """
    num_begun = min(num_assignments, num_experts)
    return num_begun + (num_assignments - num_begun) // block_size


def moe_routing(
    router_logits: torch.Tensor,
    top_k: int,
    norm_topk_prob: bool,
    block_size: int,
    *,
    tile_size: int = TILE_SIZE,
    chunk_size: int = CHUNK_SIZE,
) -> Routing:
    """The top_k of each row's experts, weighted by the softmax over all, and their assignments sorted by expert.

    router_logits: [T, N] bfloat16, float16 or float32, last dimension contiguous, T at least 1. The softmax is float32.
    Of equal logits the lower expert comes first; NaN is the largest, and makes the token's weights NaN. An expert's
    assignments ascend. norm_topk_prob divides a token's weights by their sum. block_size, tile_size and chunk_size are
    powers of two. Raises ValueError for anything else.
    """
    num_tokens, num_experts = router_logits.shape
    if router_logits.dtype not in DTYPES:
        raise ValueError(f"router_logits must be bfloat16, float16 or float32, got {router_logits.dtype}; convert them")
    if num_tokens == 0 or router_logits.stride(1) != 1:
        raise ValueError(
            "router_logits must have a row or more, and a contiguous last dimension, "
            f"got shape {list(router_logits.shape)}, strides {router_logits.stride()}"
        )
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be from 1 to the number of experts, {num_experts}, got {top_k}")
    if min(block_size, tile_size, chunk_size) < 1 or any(n & (n - 1) for n in (block_size, tile_size, chunk_size)):
        raise ValueError(
            f"block_size, tile_size and chunk_size must be powers of two, got {block_size}, {tile_size}, {chunk_size}"
        )
    num_assignments = num_tokens * top_k
    most_blocks = max_num_blocks(num_assignments, num_experts, block_size)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=router_logits.device)

    routing = Routing(
        weights=empty(num_tokens, top_k, dtype=torch.float32),
        experts=empty(num_tokens, top_k),
        sorted_assignments=empty(most_blocks * block_size),
        block_experts=empty(most_blocks),
        num_blocks=empty(1),
        block_size=block_size,
    )
    row_size = next_power_of_2(num_experts)
    tile_rows = max(1, min(tile_size // row_size, next_power_of_2(num_tokens)))
    launch(
        choose_experts_kernel,
        (cdiv(num_tokens, tile_rows),),
        router_logits, routing.weights, routing.experts,
        router_logits.stride(0), num_tokens, num_experts,
        TOP_K=top_k, NORM_TOPK_PROB=norm_topk_prob, TILE_ROWS=tile_rows, ROW_SIZE=row_size,
    )  # fmt: skip
    launch(
        sort_assignments_kernel,
        (num_experts,),
        routing.experts, routing.sorted_assignments, routing.block_experts, routing.num_blocks, num_assignments,
        num_experts,
        ROW_SIZE=row_size, BLOCK_SIZE=block_size,
        CHUNK_SIZE=min(chunk_size, next_power_of_2(num_assignments)),
    )  # fmt: skip
    return routing


@triton.jit(do_not_specialize=["num_tokens"])
def choose_experts_kernel(
    logits_ptr, weights_ptr, experts_ptr,
    row_stride, num_tokens, num_experts,
    TOP_K: tl.constexpr, NORM_TOPK_PROB: tl.constexpr, TILE_ROWS: tl.constexpr, ROW_SIZE: tl.constexpr,
):  # fmt: skip
    """Softmax and top_k of TILE_ROWS tokens."""
    token = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_token = token < num_tokens
    expert = tl.arange(0, ROW_SIZE)[None, :]
    is_expert = is_token[:, None] & (expert < num_experts)
    logits = tl.load(logits_ptr + token[:, None] * row_stride + expert, mask=is_expert, other=float("-inf"))
    logits = logits.to(tl.float32)
    key = tl.where(logits == logits, logits, float("inf"))  # NaN is the largest
    probability = tl.exp(logits - tl.max(key, axis=1)[:, None])  # not normalised yet

    rank = tl.full((TILE_ROWS, ROW_SIZE), TOP_K, tl.int32)
    for choice in tl.static_range(TOP_K):
        is_free = (rank == TOP_K) & (expert < num_experts)
        largest = tl.max(tl.where(is_free, key, float("-inf")), axis=1)
        chosen = tl.min(tl.where(is_free & (key == largest[:, None]), expert, ROW_SIZE), axis=1)
        rank = tl.where(expert == chosen[:, None], choice, rank)

    is_chosen = rank < TOP_K
    if NORM_TOPK_PROB:
        total = tl.sum(tl.where(is_chosen, probability, 0.0), axis=1)
    else:
        total = tl.sum(probability, axis=1)
    place = token[:, None] * TOP_K + rank
    is_stored = is_chosen & is_token[:, None]
    tl.store(weights_ptr + place, probability / total[:, None], mask=is_stored)
    tl.store(experts_ptr + place, tl.broadcast_to(expert, (TILE_ROWS, ROW_SIZE)), mask=is_stored)


@triton.jit(do_not_specialize=["num_assignments"])
def sort_assignments_kernel(
    experts_ptr, sorted_assignments_ptr, block_experts_ptr, num_blocks_ptr, num_assignments, num_experts,
    ROW_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK_SIZE: tl.constexpr,
):  # fmt: skip
    """The blocks of one expert. Every program counts the assignments of all experts, so that none waits for another."""
    expert = tl.program_id(0)
    experts = tl.arange(0, ROW_SIZE)
    counts = tl.zeros((ROW_SIZE,), tl.int32)
    for start in range(0, num_assignments, CHUNK_SIZE):
        assignment = start + tl.arange(0, CHUNK_SIZE)
        is_assignment = assignment < num_assignments
        chosen = tl.load(experts_ptr + assignment, mask=is_assignment, other=0)
        counts += tl.histogram(chosen, ROW_SIZE, mask=is_assignment)
    blocks = (counts + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_block = tl.sum(tl.where(experts < expert, blocks, 0))
    end_block = first_block + tl.sum(tl.where(experts == expert, blocks, 0))

    place = first_block * BLOCK_SIZE
    for start in range(0, num_assignments, CHUNK_SIZE):
        assignment = start + tl.arange(0, CHUNK_SIZE)
        chosen = tl.load(experts_ptr + assignment, mask=assignment < num_assignments, other=-1)
        is_own = (chosen == expert).to(tl.int32)
        tl.store(sorted_assignments_ptr + place + tl.cumsum(is_own) - 1, assignment, mask=is_own == 1)
        place += tl.sum(is_own)
    padding = place + tl.arange(0, BLOCK_SIZE)
    tl.store(sorted_assignments_ptr + padding, num_assignments, mask=padding < end_block * BLOCK_SIZE)
    for start in range(first_block, end_block, ROW_SIZE):
        tl.store(block_experts_ptr + start + experts, expert, mask=start + experts < end_block)
    if expert == num_experts - 1:
        tl.store(num_blocks_ptr, end_block)
