"""What this GPU reaches at best, measured in the run whose fractions are reported: copying, reading, multiplying."""

from benchmarks.arithmetic import Ceilings
from nanovllm.bench import gpu_ceilings


def measure_ceilings() -> Ceilings:
    """Bytes a second of copying and of reading, and bfloat16 operations a second of a matrix product."""
    return Ceilings(gpu_ceilings.measure_copy(), gpu_ceilings.measure_read(), gpu_ceilings.measure_matmul())
