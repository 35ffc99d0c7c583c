"""Kernels with a known fault, to show that tests/kernels' helpers notice it. copy_kernel should copy n elements."""

import os
from functools import partial

import pytest
import torch

from tests.support.kernels.guards import Guards

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
    tl.store(y_ptr + index, x, mask=mask)


def copy(fault: str, device: str) -> None:
    guards = Guards(device)
    x = guards.read(torch.arange(1, 40.0))
    with guards:
        y = torch.empty_like(x)
        copy_kernel[(triton.cdiv(x.numel(), TILE),)](x, y, x.numel(), FAULT=fault, TILE=TILE)
    guards.assert_intact()
    assert torch.equal(y, x), "y differs"


def check_is_noticed(fault: str, message: str, device: str) -> None:
    with pytest.raises(AssertionError, match=message):
        copy(fault, device)


MESSAGES = {
    "writes too much": "written outside",
    "leaves one out": "y differs",
    "reads too much": "y differs",
    "changes its input": "was changed",
}
if os.environ.get("FAULT"):
    CHECKS = {"copy": partial(copy, os.environ["FAULT"])}
else:
    CHECKS = {"copy": partial(copy, "none")}
    CHECKS |= {fault: partial(check_is_noticed, fault, message) for fault, message in MESSAGES.items()}


@triton.jit
def many_registers_kernel(x_ptr, y_ptr, TILE: tl.constexpr):
    index = tl.arange(0, TILE)
    x = tl.load(x_ptr + index)
    for _ in range(4):
        x = tl.cumsum(x, 0) * x
    tl.store(y_ptr + index, x)


def launch_with_spills() -> None:
    x = torch.empty(32768, device="meta")
    many_registers_kernel[(1,)](x, x, TILE=32768, num_warps=4)
