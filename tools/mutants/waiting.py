"""run_without_waiting: a program whose child processes are ended when they wait without end.

A mutant of a lock waits for what never comes. mutmut's own limit is ten times the time of all tests, and more on a busy
machine; the limit on CPU time never comes, since waiting takes none. A process that the machine leaves no core is not
one that waits: Linux counts its time in the queue for a core, and other systems keep to mutmut's limit.
"""

import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

LONGEST_WAIT_S = 60.0  # no test waits for so long
INTERVAL_S = 5.0
LEAST_ACTIVITY = 0.05  # share of the time; less is a loop that only looks whether it may go on


def run_without_waiting(command: list[str], directory: Path, longest_wait_s: float = LONGEST_WAIT_S) -> None:
    """Run `command`. A child of it that waits for longest_wait_s seconds gets SIGXCPU, as one that computes too long.

    Raises CalledProcessError when the command fails.
    """
    interval = min(INTERVAL_S, longest_wait_s / 4)
    waited: dict[int, tuple[float, float]] = {}  # pid -> seconds active when last looked at, seconds waited since
    with subprocess.Popen(command, cwd=directory) as process:
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(interval)
                break
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children()
                waited = {child.pid: _look_at(child, waited.get(child.pid), interval) for child in children}
                for child in children:
                    if waited[child.pid][1] >= longest_wait_s:
                        child.send_signal(signal.SIGXCPU)
    if code:
        raise subprocess.CalledProcessError(code, command)


def _look_at(process: psutil.Process, before: tuple[float, float] | None, interval: float) -> tuple[float, float]:
    now = _active_seconds(process)
    if now is None or before is None or abs(now - before[0]) > LEAST_ACTIVITY * interval:
        return now or 0.0, 0.0
    return now, before[1] + interval


def _active_seconds(process: psutil.Process) -> float | None:
    """Seconds that the process and those that it started computed, or were ready to.

    None on a system that does not count them.
    """
    nanoseconds: list[int] = []
    with suppress(psutil.NoSuchProcess, OSError):
        for pid in (process.pid, *(child.pid for child in process.children(recursive=True))):
            for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                nanoseconds += map(int, thread.read_text().split()[:2])
    return sum(nanoseconds) / 1e9 if nanoseconds else None
