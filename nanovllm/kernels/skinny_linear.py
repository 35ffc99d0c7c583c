"""skinny_linear: x W' + b for at most 16 rows of x, and the same followed by silu_and_mul.

With so few rows the weights are read once and multiplied little: the time is that of reading W. A program computes a
few columns of the output from all of K; its warps take parts of K and are summed at the end, so that the result does
not depend on what runs beside it. Weights do not change between steps, so a program begins to read them before the
kernels before it have ended ("programmatic dependent launch"), and waits only for x.

Letters: M rows, N output features, K input features.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton's types know neither launches nor what its functions return.)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.early_launch import can_launch_early
from nanovllm.kernels.launching import launch

MAX_ROWS = 16
DTYPES = (torch.float16, torch.bfloat16)


class TileConfig(NamedTuple):
    """A program computes tile_n columns of the output; each of its warps loads tile_k columns of K at once.

    Powers of two, tile_k from 16.
    """

    tile_n: int
    tile_k: int
    num_warps: int


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tiles: TileConfig | None = None,
    launches_early: bool | None = None,
) -> torch.Tensor:
    """x W' + b, [M, N], new and contiguous, summed in float32 and rounded once.

    x: [M, K], M at most 16; weight: [N, K]; bias: [N] or None. All in float16 or bfloat16, rows contiguous.
    tiles: choose_tile_config by default. launches_early: can_launch_early(device) by default.
    Raises ValueError for other shapes, strides and dtypes.
    """
    return _launch(x, weight, bias, len(weight), False, tiles, launches_early)


def skinny_linear_silu_and_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    tiles: TileConfig | None = None,
    launches_early: bool | None = None,
) -> torch.Tensor:
    """silu_and_mul(x W'), [M, N / 2]: the first half of W gives the gate, the second half what it scales.

    Rounded after the product and after silu_and_mul, as the two kernels would. Otherwise as skinny_linear.
    """
    if weight.ndim == 2 and len(weight) % 2:
        raise ValueError(f"weight must be [2 * F, K], gate and up on top of each other, got {list(weight.shape)}")
    return _launch(x, weight, None, len(weight) // 2, True, tiles, launches_early)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    num_columns: int,
    is_gated: bool,
    tiles: TileConfig | None,
    launches_early: bool | None,
) -> torch.Tensor:
    if x.ndim != 2 or len(x) > MAX_ROWS or x.stride(1) != 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be [M, K] with M at most {MAX_ROWS} and contiguous rows in float16 or bfloat16, "
            f"got {list(x.shape)} of strides {x.stride()} in {x.dtype}"
        )
    num_rows, in_features = x.shape
    if weight.ndim != 2 or weight.shape[1] != in_features or weight.stride(1) != 1 or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be [N, {in_features}] with contiguous rows in {x.dtype}, as x is, "
            f"got {list(weight.shape)} of strides {weight.stride()} in {weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.stride(0) != 1 or bias.dtype != x.dtype):
        raise ValueError(f"bias must be [{len(weight)}], contiguous, in {x.dtype}, got {list(bias.shape)} {bias.dtype}")
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if launches_early is None:
        launches_early = can_launch_early(x.device)
    if tiles is None:
        tiles = choose_tile_config(num_rows, num_columns, in_features, is_gated)
    launch(
        skinny_linear_kernel,
        (triton.cdiv(num_columns, tiles.tile_n),),
        x,
        weight,
        bias,
        out,
        num_rows,
        x.stride(0),
        weight.stride(0),
        num_columns,
        IN_FEATURES=in_features,
        ROWS=8 if num_rows <= 8 else 16,
        NUM_PARTS=tiles.num_warps,
        TILE_N=tiles.tile_n,
        TILE_K=tiles.tile_k,
        IS_GATED=is_gated,
        LAUNCHES_EARLY=launches_early,
        launch_pdl=launches_early,
        num_warps=tiles.num_warps,
    )
    return out


def choose_tile_config(num_rows: int, num_columns: int, in_features: int, is_gated: bool) -> TileConfig:
    """As measured on an H200. Best is a program that has all of K in flight and still leaves one to each processor."""
    if is_gated:
        return TileConfig(tile_n=8, tile_k=128, num_warps=4)
    if num_rows > 8:
        return TileConfig(tile_n=8, tile_k=256, num_warps=4)
    if in_features <= 1024:
        return TileConfig(tile_n=16 if num_columns >= 2048 else 8, tile_k=128, num_warps=8)
    return TileConfig(tile_n=8, tile_k=256, num_warps=8)


@triton.jit(do_not_specialize=["num_rows"])
def skinny_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # or None
    out_ptr,
    num_rows,
    x_stride,
    weight_stride,
    num_columns,
    IN_FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    IS_GATED: tl.constexpr,
    LAUNCHES_EARLY: tl.constexpr,
):
    CHUNK: tl.constexpr = NUM_PARTS * TILE_K
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, NUM_PARTS)[:, None] * TILE_K + tl.arange(0, TILE_K)[None, :]  # [parts, TILE_K]
    row_mask = (row < num_rows)[None, :, None]
    column_mask = (column < num_columns)[None, :, None]
    x_tile_ptr = x_ptr + row[None, :, None] * x_stride + k[:, None, :]  # [parts, ROWS, TILE_K]
    # int64: the last rows of a large matrix begin beyond 2**31 elements.
    tile_ptr = weight_ptr + column.to(tl.int64)[None, :, None] * weight_stride + k[:, None, :]  # [parts, N, TILE_K]
    up_offset = num_columns.to(tl.int64) * weight_stride

    in_k = (k < IN_FEATURES)[:, None, :]
    weight = tl.load(tile_ptr, mask=column_mask & in_k, other=0.0)
    if IS_GATED:
        up_weight = tl.load(tile_ptr + up_offset, mask=column_mask & in_k, other=0.0)
    if LAUNCHES_EARLY:
        gdc_wait()  # for x; the weights were there before
        gdc_launch_dependents()
    x = tl.load(x_tile_ptr, mask=row_mask & in_k, other=0.0)
    total = dot(x, weight)  # [parts, ROWS, TILE_N]
    if IS_GATED:
        up_total = dot(x, up_weight)
    for start in tl.static_range(CHUNK, IN_FEATURES, CHUNK):
        in_k = (start + k < IN_FEATURES)[:, None, :]
        weight = tl.load(tile_ptr + start, mask=column_mask & in_k, other=0.0)
        x = tl.load(x_tile_ptr + start, mask=row_mask & in_k, other=0.0)
        total += dot(x, weight)
        if IS_GATED:
            up_weight = tl.load(tile_ptr + up_offset + start, mask=column_mask & in_k, other=0.0)
            up_total += dot(x, up_weight)

    dtype = out_ptr.dtype.element_ty
    result = tl.sum(total, axis=0)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(result.dtype)[None, :]
    if IS_GATED:
        gate = result.to(dtype).to(tl.float32)
        up = tl.sum(up_total, axis=0).to(dtype).to(tl.float32)
        result = gate / (1 + tl.exp(-gate)) * up
    out = out_ptr + row[:, None] * num_columns + column[None, :]
    tl.store(out, result.to(dtype), mask=(row < num_rows)[:, None] & (column < num_columns)[None, :])


@triton.jit
def dot(x, weight):
    """[parts, ROWS, TILE_N] of x [parts, ROWS, TILE_K] and weight [parts, TILE_N, TILE_K]."""
    return tl.dot(x, tl.permute(weight, (0, 2, 1)))
