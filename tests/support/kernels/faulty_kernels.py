"""Kernels with a known fault, to show that the harness notices it. copy_kernel should copy x."""

import time
from types import SimpleNamespace

import pytest
import torch

from tests.support.kernels.accuracy import assert_like_reference
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import Check, case
from tests.support.limits import HANG_SECONDS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

TILE = 16


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, FAULT: tl.constexpr, TILE: tl.constexpr):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = index < n
    if FAULT == "writes too much":
        mask = index < n + 1
    if FAULT == "leaves one out":
        mask = index < n - 1
    x = tl.load(x_ptr + index, mask=index < n, other=0.0)
    if FAULT == "reads too much":
        x = x + tl.sum(tl.load(x_ptr + index))
    if FAULT == "changes its input":
        tl.store(x_ptr + index, x + 1, mask=mask)
    if FAULT == "depends on the order":  # writes what the next program will write over
        tl.store(y_ptr + index + TILE, x, mask=index + TILE < n)
    if FAULT == "adds to one":
        x = tl.where(index == 30, x + 0.5, x)
    if FAULT == "kills the process":
        tl.store(y_ptr + index + 2**40, x)
    tl.store(y_ptr + index, x, mask=mask)


@case
def check_copy(device: str, fault: str, dtype: torch.dtype, *, tile_size: int) -> None:
    guards = Guards(device)
    x = guards.read(torch.arange(1.0, 40.0).view(3, 13).to(dtype))
    with guards:
        y = torch.empty_like(x)
        copy_kernel[(triton.cdiv(x.numel(), tile_size),)](x, y, x.numel(), FAULT=fault, TILE=tile_size)
    assert_like_reference("copy", y, lambda x: x, (x,), ("token", "element"))


def check_hangs(device: str) -> None:
    time.sleep(2 * HANG_SECONDS)


class Cases(dict[str, Check]):
    def __missing__(self, fault: str) -> Check:
        return check_copy(fault, torch.float32, tile_size=TILE)


KERNEL = SimpleNamespace(cases=Cases(hangs=check_hangs))


@triton.jit
def many_registers_kernel(x_ptr, y_ptr, TILE: tl.constexpr):
    index = tl.arange(0, TILE)
    x = tl.load(x_ptr + index)
    tl.store(y_ptr + index, x * tl.sum(x))  # until the sum is known, all of x is kept


def launch_with_spills() -> None:
    """512 elements a thread."""
    x = torch.empty(16384, device="meta")
    many_registers_kernel[(1,)](x, x, TILE=16384, num_warps=1)
