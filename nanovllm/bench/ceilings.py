"""The ceilings of the device for reading memory and multiplying, measured in the run whose fractions are reported."""

import time
from collections.abc import Callable
from statistics import median

from nanovllm.bench.limits import Ceilings
from nanovllm.omp_wait_policy import passive_omp_wait

with passive_omp_wait():  # this may be the first import of torch in the process
    import torch

CPU_BYTES = 2**28  # more than the last-level cache of most CPUs
CPU_MATMUL_SIZE = 1024
CPU_SECONDS = 1.0  # limit of each measurement: some CPUs multiply bfloat16 a hundred times more slowly than float32
MAX_ROUNDS = 15


def measure_ceilings(device: torch.device, dtype: str) -> Ceilings:
    """The ceilings of `device`, a CPU or the current GPU; the matrix product is of `dtype`.

    Takes 2 GiB of a GPU's memory for about a second, and 0.5 GiB of a CPU's for about two. Raises what torch raises if
    there is less.
    """
    torch_dtype = getattr(torch, dtype)
    if device.type == "cuda":
        from nanovllm.bench.gpu_ceilings import measure_matmul, measure_read

        ceilings = Ceilings(measure_read(), measure_matmul(torch_dtype))
        torch.cuda.empty_cache()  # the engine sizes its cache from free memory
        return ceilings
    source = torch.rand(CPU_BYTES // 4)
    target = torch.empty_like(source)
    reading = CPU_BYTES / _cpu_seconds(source.sum)
    copying = 2 * CPU_BYTES / _cpu_seconds(lambda: target.copy_(source))  # it reads and writes
    left, right = (torch.randn(CPU_MATMUL_SIZE, CPU_MATMUL_SIZE).to(torch_dtype) for _ in range(2))
    return Ceilings(max(reading, copying), 2 * CPU_MATMUL_SIZE**3 / _cpu_seconds(lambda: left @ right))


def _cpu_seconds(call: Callable[[], object]) -> float:
    """Median seconds over MAX_ROUNDS calls, or over as many as CPU_SECONDS hold; the first call is not timed."""
    call()
    times = []
    begin = time.perf_counter()
    while len(times) < MAX_ROUNDS and (not times or time.perf_counter() - begin < CPU_SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)
