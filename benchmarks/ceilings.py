"""What this GPU reaches at best, measured in the run whose fractions are reported: copying, reading, multiplying."""

from collections.abc import Callable
from statistics import median

import torch
import triton
import triton.language as tl

from benchmarks.arithmetic import Ceilings

COPY_BYTES = 2**31
MATMUL_SIZE = 8192
READ_TILE = 8192


def measure_ceilings() -> Ceilings:
    """The better of two ways for copying and reading, each the median of several; random data, never zeros."""
    source = torch.randint(0, 2**31 - 1, (COPY_BYTES // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source))
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    grid = (source.numel() // READ_TILE,)
    read = COPY_BYTES / min(
        _median_seconds(lambda: read_kernel[grid](source, sink, READ_TILE, num_warps=8)),
        _median_seconds(lambda: torch.max(source)),
    )
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").bfloat16() for _ in range(2))
    matmul = 2 * MATMUL_SIZE**3 / _median_seconds(lambda: left @ right)
    return Ceilings(copy, read, matmul)


@triton.jit
def read_kernel(source_ptr, sink_ptr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    largest = tl.max(tl.load(source_ptr + offset))
    if largest < 0:  # never, which the compiler cannot know: so it loads
        tl.store(sink_ptr, largest)


def _median_seconds(call: Callable[[], object], rounds: int = 15) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return median(times)
