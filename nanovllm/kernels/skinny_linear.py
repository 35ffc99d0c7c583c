"""skinny_linear: x W' + b for at most 16 rows of x; norm_skinny_linear: add_rms_norm before it, silu_and_mul after it.

With so few rows the weights are read once and multiplied little: the time is that of reading W. A program computes a
few columns of the output from all of K; its warps take parts of K and are summed at the end, so that the result does
not depend on what runs beside it. Weights do not change between steps, so a program begins to read them before the
kernels before it have ended ("programmatic dependent launch"), and waits only for x.

Each program normalises all of x: that takes less time than launching a norm kernel.

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
from nanovllm.kernels.launching import cdiv, launch
from nanovllm.kernels.rms_norm import scale_and_weight

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
    return _launch(x, None, None, 0.0, weight, bias, False, tiles, launches_early)[0]


def norm_skinny_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    is_gated: bool = False,
    tiles: TileConfig | None = None,
    launches_early: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, x + residual): y is skinny_linear of add_rms_norm(x, residual, norm_weight, eps), [M, N].

    is_gated: y is silu_and_mul of that, [M, N / 2]: the first half of W gives the gate, the second what it scales.
    residual: [M, K], or None for zeros: then the second result is x itself. norm_weight: [K], contiguous, of x's dtype.
    Rounds wherever the separate kernels would. Otherwise as skinny_linear.
    """
    return _launch(x, residual, norm_weight, eps, weight, bias, is_gated, tiles, launches_early)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_gated: bool,
    tiles: TileConfig | None,
    launches_early: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, norm_weight, weight, bias, is_gated)
    num_rows, in_features = x.shape
    num_columns = len(weight) // 2 if is_gated else len(weight)
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out, total
    if launches_early is None:
        launches_early = can_launch_early(x.device)
    if tiles is None:
        tiles = choose_tile_config(num_rows, num_columns, in_features, is_gated)
    launch(
        skinny_linear_kernel,
        (cdiv(num_columns, tiles.tile_n),),
        x, residual, norm_weight, weight, bias, total, out, eps, num_rows,
        x.stride(0), 0 if residual is None else residual.stride(0), weight.stride(0), num_columns,
        IN_FEATURES=in_features, ROWS=8 if num_rows <= 8 else 16, NUM_PARTS=tiles.num_warps,
        TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, IS_GATED=is_gated, LAUNCHES_EARLY=launches_early,
        launch_pdl=launches_early, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out, total


def _check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_gated: bool,
) -> None:
    if x.ndim != 2 or len(x) > MAX_ROWS or x.stride(1) != 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be [M, K] with M at most {MAX_ROWS} and contiguous rows in float16 or bfloat16, "
            f"got {list(x.shape)} of strides {x.stride()} in {x.dtype}"
        )
    size = x.shape[1]
    expected = {
        "weight": (weight, f"[N, {size}]", (len(weight), size)),
        "bias": (bias, f"[{len(weight)}]", (len(weight),)),
        "norm_weight": (norm_weight, f"[{size}]", (size,)),
        "residual": (residual, f"{list(x.shape)}", x.shape),
    }
    for name, (tensor, described, shape) in expected.items():
        if tensor is not None and (tensor.shape != shape or tensor.stride(-1) != 1 or tensor.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {described} with contiguous rows in {x.dtype}, as x is, "
                f"got {list(tensor.shape)} of strides {tensor.stride()} in {tensor.dtype}"
            )
    if is_gated and len(weight) % 2:
        raise ValueError(f"weight must be [2 * F, K], gate and up on top of each other, got {list(weight.shape)}")


def choose_tile_config(num_rows: int, num_columns: int, in_features: int, is_gated: bool) -> TileConfig:
    """As measured on an H200: many loads in flight, and enough programs for all multiprocessors."""
    if is_gated:
        return TileConfig(tile_n=8, tile_k=128, num_warps=4)
    if num_rows > 8:
        return TileConfig(tile_n=8, tile_k=256, num_warps=4)
    if in_features <= 1024:
        return TileConfig(tile_n=16 if num_columns >= 2048 else 8, tile_k=128, num_warps=8)
    if num_columns > 4096:
        return TileConfig(tile_n=16, tile_k=256, num_warps=4)
    return TileConfig(tile_n=8, tile_k=256, num_warps=4 if num_columns > 2048 else 8)


@triton.jit(do_not_specialize=["num_rows"])
def skinny_linear_kernel(
    x_ptr,
    residual_ptr,  # or None
    norm_weight_ptr,  # or None: x is multiplied as it is
    weight_ptr,
    bias_ptr,  # or None
    total_ptr, out_ptr, eps, num_rows,
    x_stride, residual_stride, weight_stride, num_columns,
    IN_FEATURES: tl.constexpr, ROWS: tl.constexpr, NUM_PARTS: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr, IS_GATED: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    CHUNK: tl.constexpr = NUM_PARTS * TILE_K
    dtype = out_ptr.dtype.element_ty
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, NUM_PARTS)[:, None] * TILE_K + tl.arange(0, TILE_K)[None, :]  # [parts, TILE_K]
    row_mask = (row < num_rows)[None, :, None]
    column_mask = (column < num_columns)[None, :, None]
    x_tile_ptr = x_ptr + row[None, :, None] * x_stride + k[:, None, :]  # [parts, ROWS, TILE_K]
    residual_tile_ptr = residual_ptr
    if residual_ptr is not None:
        residual_tile_ptr = residual_ptr + row[None, :, None] * residual_stride + k[:, None, :]
    # int64: the last rows of a large matrix begin beyond 2**31 elements.
    tile_ptr = weight_ptr + column.to(tl.int64)[None, :, None] * weight_stride + k[:, None, :]  # [parts, N, TILE_K]
    up_offset = tl.full((), num_columns, tl.int64) * weight_stride  # num_columns is a constant if it is 1

    in_k = (k < IN_FEATURES)[:, None, :]
    weight = tl.load(tile_ptr, mask=column_mask & in_k, other=0.0)
    if IS_GATED:
        up_weight = tl.load(tile_ptr + up_offset, mask=column_mask & in_k, other=0.0)
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + k, mask=k < IN_FEATURES, other=0.0)
    if LAUNCHES_EARLY:
        gdc_wait()  # for x and the residual; the weights were there before
        gdc_launch_dependents()
    if norm_weight_ptr is not None:
        squares = tl.zeros([NUM_PARTS, ROWS], tl.float32)
        for start in tl.static_range(0, IN_FEATURES, CHUNK):
            in_k = (start + k < IN_FEATURES)[:, None, :]
            wide = load_sum(x_tile_ptr, residual_tile_ptr, start, row_mask & in_k).to(tl.float32)
            squares += tl.sum(wide * wide, axis=2)
        scale = tl.rsqrt(tl.sum(squares, axis=0) / IN_FEATURES + eps)[None, :, None]
        in_k = (k < IN_FEATURES)[:, None, :]
    x = load_sum(x_tile_ptr, residual_tile_ptr, 0, row_mask & in_k)
    if residual_ptr is not None and tl.program_id(0) == 0:
        tl.store(total_ptr + row[None, :, None] * IN_FEATURES + k[:, None, :], x, mask=row_mask & in_k)
    if norm_weight_ptr is not None:
        x = scale_and_weight(x.to(tl.float32), scale, norm_weight[:, None, :].to(tl.float32), dtype).to(dtype)
    total = dot(x, weight)  # [parts, ROWS, TILE_N]
    if IS_GATED:
        up_total = dot(x, up_weight)
    for start in tl.static_range(CHUNK, IN_FEATURES, CHUNK):
        in_k = (start + k < IN_FEATURES)[:, None, :]
        weight = tl.load(tile_ptr + start, mask=column_mask & in_k, other=0.0)
        x = load_sum(x_tile_ptr, residual_tile_ptr, start, row_mask & in_k)
        if residual_ptr is not None and tl.program_id(0) == 0:
            tl.store(total_ptr + row[None, :, None] * IN_FEATURES + start + k[:, None, :], x, mask=row_mask & in_k)
        if norm_weight_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + start + k, mask=start + k < IN_FEATURES, other=0.0)
            x = scale_and_weight(x.to(tl.float32), scale, norm_weight[:, None, :].to(tl.float32), dtype).to(dtype)
        total += dot(x, weight)
        if IS_GATED:
            up_weight = tl.load(tile_ptr + up_offset + start, mask=column_mask & in_k, other=0.0)
            up_total += dot(x, up_weight)

    result = tl.sum(total, axis=0)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(result.dtype)[None, :]
    if IS_GATED:
        up = tl.sum(up_total, axis=0)
        if bias_ptr is not None:
            up_bias = tl.load(bias_ptr + num_columns + column, mask=column < num_columns, other=0.0)
            up += up_bias.to(up.dtype)[None, :]
        gate, up = result.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        result = gate / (1 + tl.exp(-gate)) * up
    out = out_ptr + row[:, None] * num_columns + column[None, :]
    tl.store(out, result.to(dtype), mask=(row < num_rows)[:, None] & (column < num_columns)[None, :])


@triton.jit
def load_sum(x_ptr, residual_ptr, start, mask):
    """x + residual, rounded, from column `start` on; x where there is no residual."""
    x = tl.load(x_ptr + start, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + start, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def dot(x, weight):
    """[parts, ROWS, TILE_N] of x [parts, ROWS, TILE_K] and weight [parts, TILE_N, TILE_K]."""
    return tl.dot(x, tl.permute(weight, (0, 2, 1)))
