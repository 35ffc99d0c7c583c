"""The ceilings of this GPU for copying, reading and multiplying, measured in the run whose fractions are reported."""

from benchmarks.arithmetic import Ceilings
from nanovllm.bench import gpu_ceilings


def measure_ceilings() -> Ceilings:
    """Bytes a second of copying and of reading, and bfloat16 operations a second of a matrix product."""
    return Ceilings(gpu_ceilings.measure_copy(), gpu_ceilings.measure_read(), gpu_ceilings.measure_matmul())
