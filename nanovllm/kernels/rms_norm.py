"""rms_norm and add_rms_norm: a program reads some rows once, normalises them in registers and writes them once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels import DTYPES
from nanovllm.kernels.early_launch import pays_between_linear_layers
from nanovllm.kernels.launching import cdiv, launch, next_power_of_2

MANY_ROWS = 4096  # programs of several rows still fill the GPU


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, rows: int | None = None, num_warps: int | None = None
) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension, contiguous, in x's dtype.

    x: [T, E] or [T, heads, E], float32, float16 or bfloat16, last dimension contiguous (so views of a packed qkv).
    weight: [E], contiguous, of x's dtype. Mean and division are float32, rounded to the dtype, then times weight.
    rows: rows of a program, a power of two. Raises ValueError for other shapes, strides and dtypes.
    """
    return _launch(x, None, weight, eps, rows, num_warps)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    rows: int | None = None,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm of x + residual, x + residual), both new and contiguous. residual: of x's shape and dtype."""
    return _launch(x, residual, weight, eps, rows, num_warps)


def choose_launch(num_rows: int, size: int) -> tuple[int, int]:
    """(rows, num_warps) of a program, as measured. With many rows, a program takes a power of two, 2048 elements."""
    rows = 1
    while num_rows >= MANY_ROWS and 2 * rows * size <= 2048:
        rows *= 2
    return rows, 4 if size <= 2048 else 8


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: int | None, num_warps: int | None
) -> tuple[Tensor, Tensor]:
    """(normed, x + residual); x itself where there is no residual."""
    if x.ndim not in (2, 3) or x.stride(-1) != 1 or x.dtype not in DTYPES:
        raise ValueError(
            "x must be [T, E] or [T, heads, E] with a contiguous last dimension in float32, float16 or bfloat16, "
            f"got {list(x.shape)} of strides {x.stride()} in {x.dtype}"
        )
    size = x.shape[-1]
    if weight.shape != (size,) or weight.stride(0) != 1 or weight.dtype != x.dtype:
        raise ValueError(f"weight must be [{size}], contiguous, in {x.dtype}, as x is, got {list(weight.shape)}")
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x
    if residual is not None:
        if residual.shape != x.shape or residual.stride(-1) != 1 or residual.dtype != x.dtype:
            raise ValueError(
                f"residual must be {list(x.shape)} in {x.dtype}, as x is, with a contiguous last dimension, "
                f"got {list(residual.shape)} of strides {residual.stride()} in {residual.dtype}"
            )
        total = torch.empty_like(normed)
    num_rows = x.numel() // size if size else 0
    if num_rows == 0:
        return normed, total
    default_rows, default_warps = choose_launch(num_rows, size)
    rows = default_rows if rows is None else rows
    launches_early = pays_between_linear_layers(x.device, len(x), size)
    launch(
        rms_norm_kernel,
        (cdiv(num_rows, rows),),
        x, residual, weight, normed, total, eps, num_rows, x.shape[1] if x.ndim == 3 else 1,
        x.stride(0), x.stride(1) if x.ndim == 3 else 0,
        0 if residual is None else residual.stride(0),
        residual.stride(1) if residual is not None and residual.ndim == 3 else 0,
        SIZE=size, PADDED_SIZE=next_power_of_2(size), ROWS=rows, HAS_RESIDUAL=residual is not None,
        LAUNCHES_EARLY=launches_early, launch_pdl=launches_early,
        num_warps=default_warps if num_warps is None else num_warps,
    )  # fmt: skip
    return normed, total


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, eps, num_rows, num_heads,
    x_token_stride, x_head_stride, residual_token_stride, residual_head_stride,
    SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    token, head = row // num_heads, row % num_heads
    element = tl.arange(0, PADDED_SIZE)[None, :]
    mask = (row < num_rows) & (element < SIZE)
    weight = tl.load(weight_ptr + element, mask=element < SIZE, other=0.0).to(tl.float32)
    if LAUNCHES_EARLY:
        gdc_wait()  # for x and the residual
        gdc_launch_dependents()
    x = tl.load(x_ptr + token * x_token_stride + head * x_head_stride + element, mask=mask, other=0.0)
    dtype = x.dtype
    wide = x.to(tl.float32)
    if HAS_RESIDUAL:
        offset = token * residual_token_stride + head * residual_head_stride + element
        residual = tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        total = (wide + residual).to(dtype)
        tl.store(total_ptr + row * SIZE + element, total, mask=mask)
        wide = total.to(tl.float32)  # the rounded sum, which the next layer reads, is normalised
    mean = tl.sum(wide * wide, axis=1, keep_dims=True) / SIZE
    normed = scale_and_weight(wide, tl.rsqrt(mean + eps), weight, dtype)
    tl.store(normed_ptr + row * SIZE + element, normed.to(dtype), mask=mask)


@triton.jit
def scale_and_weight(x, scale, weight, dtype: tl.constexpr):
    """x * scale, rounded to dtype, times weight; all float32, the result too."""
    return (x * scale).to(dtype).to(tl.float32) * weight
