"""The ceilings of the current GPU for reading memory and for a matrix product: medians over calls with random data."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

NUM_BYTES = 2**31
MATMUL_SIZE = 8192
READ_TILE = 8192
ROUNDS = 15


def measure_read() -> float:
    """Bytes a second of reading NUM_BYTES: the faster of a Triton kernel and torch.max."""
    source = random_integers()
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    grid = (source.numel() // READ_TILE,)
    options: dict[str, Any] = {"TILE": READ_TILE, "num_warps": 8}
    return NUM_BYTES / min(
        median_seconds(lambda: read_kernel[grid](source, sink, **options)),
        median_seconds(lambda: torch.max(source)),
    )


def measure_matmul(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a product of two square matrices of MATMUL_SIZE."""
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").to(dtype) for _ in range(2))
    return 2 * MATMUL_SIZE**3 / median_seconds(lambda: left @ right)


def random_integers() -> torch.Tensor:
    """NUM_BYTES of int32, none of them negative."""
    return torch.randint(0, 2**31 - 1, (NUM_BYTES // 4,), dtype=torch.int32, device="cuda")


@triton.jit
def read_kernel(source_ptr, sink_ptr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    largest = tl.max(tl.load(source_ptr + offset))
    if largest < 0:  # never true, but the compiler cannot know that, so it keeps the loads
        tl.store(sink_ptr, largest)


def median_seconds(call: Callable[[], object]) -> float:
    """The median over ROUNDS calls, after three that are not timed."""
    for _ in range(3):
        call()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return median(times)
