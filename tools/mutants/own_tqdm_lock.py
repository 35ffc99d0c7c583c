"""A pytest plugin for mutmut, which forks a process for each mutant and kills those that take too long.

The lock of tqdm is shared by forked processes: one killed while it holds the lock would block all later ones.
"""

import threading

from tqdm import tqdm

tqdm.set_lock(threading.RLock())
