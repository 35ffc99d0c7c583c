"""grouped_gemm: each token's weighted sum over its experts, with one grid for the matrices of all experts.

    hidden[a]  = silu(gate[n] . x[a // top_k]) * (up[n] . x[a // top_k])      a: assignment, n: its expert
    product[a] = weight[a] * down[n] . hidden[a]
    y[t]       = sum of product[a] over the top_k assignments of token t, in their order

Each program computes one tile of the output: the rows of one block (see kernels.moe_routing) and some of the columns.
Rows are loaded and stored at the index of their assignment, so the order of summation does not depend on the routing: a
token's output is the same in every run and with any other tokens in the batch. reference.moe is the definition.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import DTYPES
from nanovllm.kernels.launching import cdiv, launch, next_power_of_2
from nanovllm.kernels.moe_routing import Routing


class TileConfig(NamedTuple):
    """Tile of one program, and its launch options.

    rows, columns, inner: dimensions of the tile, powers of two from 16. num_warps, num_stages: Triton's launch options.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


def choose_tile_config(num_assignments: int, num_experts: int, itemsize: int) -> TileConfig:
    """Tile sizes for num_assignments spread over num_experts. Measured on an H200 with Qwen3-30B-A3B's shapes.

    With few rows per expert, reading the weights takes most of the time and a block's padding is wasted work. With many
    rows per expert, the multiplications take most of the time. num_assignments is rounded up to a power of two, as
    moe_routing does for its chunks, because start-up compiles the kernels for powers of two only.
    """
    if itemsize > 2:
        return TileConfig(rows=16, columns=64, inner=32, num_warps=4, num_stages=3)
    rows_per_expert = next_power_of_2(num_assignments) / num_experts
    if rows_per_expert < 1:
        return TileConfig(rows=16, columns=32, inner=128, num_warps=2, num_stages=4)
    if rows_per_expert < 16:
        return TileConfig(rows=16, columns=64, inner=128, num_warps=4, num_stages=4)
    if rows_per_expert < 64:
        return TileConfig(rows=32, columns=128, inner=128, num_warps=4, num_stages=3)
    return TileConfig(rows=128, columns=256, inner=32, num_warps=8, num_stages=4)


def grouped_gemm(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, routing: Routing, *, tiles: TileConfig | None = None
) -> Tensor:
    """The mixture of experts: each token's weighted sum over its experts. hidden_states and output: [T, E].

    gate_up_proj: [N, 2 * F, E], the gate's rows first. down_proj: [N, E, F]. All of one dtype, bfloat16, float16 or
    float32, contiguous. Sums are float32; the hidden activations and each expert's weighted product are rounded to the
    dtype. routing: the Routing of these tokens, with block_size = tiles.rows. tiles: choose_tile_config() by default.
    Raises ValueError for other shapes, dtypes, strides or tiles.
    """
    num_tokens, hidden_size = hidden_states.shape
    num_experts, _, intermediate_size = down_proj.shape
    num_assignments = routing.experts.numel()
    tiles = tiles or choose_tile_config(num_assignments, num_experts, hidden_states.element_size())
    _check(hidden_states, gate_up_proj, down_proj, routing, tiles)
    hidden = hidden_states.new_empty(num_assignments, intermediate_size)
    _multiply(hidden_states, gate_up_proj, routing, hidden, tiles, routing.experts.shape[1], is_gate_up=True)
    products = hidden_states.new_empty(num_assignments, hidden_size)
    _multiply(hidden, down_proj, routing, products, tiles, 1, is_gate_up=False)
    return products.view(num_tokens, -1, hidden_size).sum(dim=1)


def _multiply(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    output: Tensor,
    tiles: TileConfig,
    assignments_per_row: int,
    is_gate_up: bool,
) -> None:
    num_columns, inner_size = weight.shape[1:]
    num_column_tiles = cdiv(num_columns, tiles.columns)
    launch(
        grouped_gemm_kernel,
        (routing.block_experts.numel() * num_column_tiles,),
        x, weight, routing.weights, routing.sorted_assignments, routing.block_experts, routing.num_blocks,
        output, routing.experts.numel(), num_columns, inner_size, num_column_tiles,
        ASSIGNMENTS_PER_ROW=assignments_per_row, IS_GATE_UP=is_gate_up, IS_EVEN=inner_size % tiles.inner == 0,
        TILE_ROWS=tiles.rows, TILE_COLUMNS=tiles.columns, TILE_INNER=tiles.inner, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip


def _check(hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, routing: Routing, tiles: TileConfig) -> None:
    num_experts, hidden_size, intermediate_size = down_proj.shape
    expected = {
        "hidden_states": (hidden_states, (len(routing.experts), hidden_size)),
        "gate_up_proj": (gate_up_proj, (num_experts, 2 * intermediate_size, hidden_size)),
        "down_proj": (down_proj, (num_experts, hidden_size, intermediate_size)),
    }
    if hidden_states.dtype not in DTYPES:
        raise ValueError(f"hidden_states must be bfloat16, float16 or float32, got {hidden_states.dtype}; convert them")
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or tensor.dtype != hidden_states.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, {hidden_states.dtype} and of shape {list(shape)}, as routing and "
                f"down_proj require, got {tensor.dtype}, shape {list(tensor.shape)}, strides {tensor.stride()}"
            )
    if routing.block_size != tiles.rows:
        raise ValueError(
            f"routing's block_size must be the rows of a tile, {tiles.rows}, got {routing.block_size}; "
            "take it from choose_tile_config"
        )
    if any(size < 16 or size & (size - 1) for size in tiles[:3]):
        raise ValueError(f"tiles must be powers of two from 16, got {tiles}")


@triton.jit(do_not_specialize=["num_assignments"])
def grouped_gemm_kernel(
    x_ptr, weight_ptr, routing_weights_ptr, sorted_assignments_ptr, block_experts_ptr, num_blocks_ptr,
    output_ptr, num_assignments, num_columns, inner_size, num_column_tiles,
    ASSIGNMENTS_PER_ROW: tl.constexpr, IS_GATE_UP: tl.constexpr, IS_EVEN: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, TILE_INNER: tl.constexpr,
):  # fmt: skip
    """Compute a tile of x . weight[expert], then apply silu_and_mul if IS_GATE_UP, else multiply by routing weights."""
    block = tl.program_id(0) // num_column_tiles
    if block >= tl.load(num_blocks_ptr):
        return
    expert = tl.load(block_experts_ptr + block).to(tl.int64)  # int64: expert * matrix size exceeds 2**31
    assignment = tl.load(sorted_assignments_ptr + block * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
    is_row = assignment < num_assignments
    column = tl.program_id(0) % num_column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    weight_row = column % num_columns  # the last tile computes columns beyond the end and does not store them
    if IS_GATE_UP:  # gate and up rows alternate, so that each pair is in adjacent columns
        weight_row = weight_row // 2 + weight_row % 2 * (num_columns // 2)

    inner = tl.arange(0, TILE_INNER)
    x_ptrs = x_ptr + (assignment // ASSIGNMENTS_PER_ROW)[:, None] * inner_size + inner[None, :]
    weight_ptrs = weight_ptr + (expert * num_columns + weight_row)[None, :] * inner_size + inner[:, None]
    products = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for start in range(0, inner_size, TILE_INNER):
        if IS_EVEN:
            x = tl.load(x_ptrs + start, mask=is_row[:, None], other=0.0)
            weight = tl.load(weight_ptrs + start)
        else:
            is_inner = inner < inner_size - start
            x = tl.load(x_ptrs + start, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            weight = tl.load(weight_ptrs + start, mask=is_inner[:, None], other=0.0)
        if x.dtype == tl.float32:
            # Sum the products of each tile before adding them to the total: adding 2048 products one by one has a
            # larger rounding error than torch's float32 product. With `+`, the compiler would add them one by one.
            products = tl.fma(tl.dot(x, weight, input_precision="ieee"), 1.0, products)
        else:
            products = tl.dot(x, weight, products)

    if IS_GATE_UP:
        gate, up = tl.split(products.reshape(TILE_ROWS, TILE_COLUMNS // 2, 2))
        result = gate / (1 + tl.exp(-gate)) * up
        size: tl.constexpr = TILE_COLUMNS // 2
        output_size = num_columns // 2
    else:
        result = products * tl.load(routing_weights_ptr + assignment, mask=is_row, other=0.0)[:, None]
        size: tl.constexpr = TILE_COLUMNS
        output_size = num_columns
    output_column = tl.program_id(0) % num_column_tiles * size + tl.arange(0, size)
    output_ptrs = output_ptr + assignment[:, None] * output_size + output_column[None, :]
    is_stored = is_row[:, None] & (output_column < output_size)[None, :]
    tl.store(output_ptrs, result.to(output_ptr.dtype.element_ty), mask=is_stored)
