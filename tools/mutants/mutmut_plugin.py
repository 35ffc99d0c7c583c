"""A pytest plugin for mutmut, which forks a process for each mutant and kills those that take too long.

mutmut's own limit is wall-clock time, and a busy machine uses that up through no fault of the mutant. [tool.mutmut]
sets it so high that only a mutant that waits without end reaches it. The limit on CPU time below ends those that
compute without end.

The lock of tqdm is shared by forked processes: one killed while it holds the lock would block all later ones.
"""

import os
import resource
import threading
import time

from tqdm import tqdm

CPU_SECONDS = 120  # as tools/mutants/runner.py; the tests of a survivor take up to 40

tqdm.set_lock(threading.RLock())


def pytest_configure() -> None:
    if "__mutmut_" in os.environ.get("MUTANT_UNDER_TEST", ""):  # neither the statistics nor the unchanged code
        hard_limit = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_SECONDS, hard_limit))
