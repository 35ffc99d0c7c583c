"""How OpenMP's threads wait for work: asleep, not spinning. Decided when torch is imported, since OpenMP reads it once.

After each operation OpenMP's threads spin for some time, so that the next one starts sooner. On a machine whose cores
other processes want too, a spinning thread uses up its share of a core, and every operation then waits for a thread
that does not run: on two busy cores, most steps with two threads took four to thirty times as long as with one. With
threads that sleep most took between a third and twice as long as with one (tools/measure_cpu_threads.py).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is the user's own decision


@contextmanager
def passive_omp_wait() -> Iterator[None]:
    """For the first import of torch in the process; later it has no effect. Restores the environment."""
    if any(name in os.environ for name in _VARIABLES):
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)
