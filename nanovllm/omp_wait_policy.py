"""passive_omp_wait: sets OpenMP's wait policy to passive, so that its threads sleep while they wait.

OpenMP reads the policy once, when torch is imported. By default its threads spin for some time after each operation,
so that the next one starts sooner. If other processes use the same cores, a spinning thread uses up its share of a
core, and every operation waits for a thread that is not running: on two busy cores, most steps with two threads took 4
to 30 times as long as with one. With the passive policy, most took 0.33 to 2 times as long
(tools/measure_cpu_threads.py).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # if one is set, the user has chosen


@contextmanager
def passive_omp_wait() -> Iterator[None]:
    """Use it around the first import of torch in the process; later it has no effect. Restores the environment."""
    if any(name in os.environ for name in _VARIABLES):
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)
