"""Times of calls on the current GPU, between two events."""

from collections.abc import Callable
from statistics import median

import torch


def median_seconds(call: Callable[[], object], num_calls: int = 15, num_warmups: int = 3) -> float:
    """The median over num_calls calls, launches included, after some that are not timed."""
    for _ in range(num_warmups):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(num_calls):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return median(times)
