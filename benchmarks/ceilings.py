"""The ceilings of this GPU for copying, reading and multiplying, measured in the run whose fractions are reported."""

import torch

from benchmarks.arithmetic import Ceilings
from nanovllm.bench.gpu_ceilings import measure_matmul, measure_read, median_seconds, random_integers


def measure_ceilings() -> Ceilings:
    """Bytes a second of copying and of reading, and bfloat16 operations a second of a matrix product."""
    return Ceilings(measure_copy(), measure_read(), measure_matmul())


def measure_copy() -> float:
    """Bytes a second, read plus written."""
    source = random_integers()
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
