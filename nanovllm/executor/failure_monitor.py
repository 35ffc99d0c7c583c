"""FailureMonitor: a thread that reads the workers' reports and determines the root cause of the first failure."""

import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing import Pipe, connection
from multiprocessing.connection import Connection

from nanovllm.distributed.process_group import DaemonThread
from nanovllm.executor.base import RankError, RankValueError

READY = "ready"  # a worker's first message: the worker has imported torch and the user's program
FAILURE_COLLECT_S = 0.5  # time after the first failure in which reports of other ranks are read
MAX_TRACEBACK_CHARS = 20_000


@dataclass(frozen=True)
class RankFailure:
    """A failed rank's report. time: from time.monotonic(), one clock for all processes of a machine."""

    cause: str
    traceback: str
    is_value_error: bool
    time: float

    @staticmethod
    def of(error: BaseException) -> "RankFailure":
        text = "".join(traceback.format_exception(error))[-MAX_TRACEBACK_CHARS:]
        return RankFailure(f"{type(error).__name__}: {error}", text, isinstance(error, ValueError), time.monotonic())

    def describe(self, rank: int, size: int) -> str:
        return f"rank {rank} of {size} failed: {self.cause}\n\nIts traceback:\n{self.traceback}"


class State(Enum):
    """STARTING: not every worker is READY. STOPPING: the workers are asked to end. FAILED: they are terminated."""

    STARTING = auto()
    RUNNING = auto()
    STOPPING = auto()
    FAILED = auto()
    CLOSED = auto()


class FailureMonitor:
    """Watches the workers, ranks 1, 2, ..., from construction until stop(), fail(), close() or the first failure.

    pipes: by rank, the receiving end of a pipe into which the worker sends READY and, when it fails, a RankFailure. The
        pipe closes when the worker's process ends. Without pipes (under torchrun) only fail() leads to FAILED.
    exit_code: returns the exit code of a rank whose pipe closed without a report; None if unknown.
    terminate: kills the workers. Called in the monitor's thread on a failure, before the state is FAILED.
    unblock: unblocks rank 0. Called in the monitor's thread when the state is FAILED, so that rank 0 does not mistake
        the output of an aborted collective for a result.
    """

    def __init__(
        self,
        pipes: Mapping[int, Connection],
        exit_code: Callable[[int], int | None] = lambda rank: None,
        terminate: Callable[[], None] = lambda: None,
        unblock: Callable[[], None] = lambda: None,
    ) -> None:
        self._pipes = pipes
        self._exit_code, self._terminate, self._unblock = exit_code, terminate, unblock
        self._changed = threading.Condition()  # its lock guards the two below
        self._state = State.STARTING if pipes else State.RUNNING
        self._root_cause: RankError | None = None
        self._wake, self._wake_sender = Pipe(duplex=False)
        self._thread = DaemonThread(self._watch)
        try:
            if pipes:
                self._thread.start()
        except BaseException:  # Ctrl-C
            self.close()
            raise

    def check(self) -> None:
        """Raise the root cause if a rank has failed, RuntimeError if rank 0 itself has, or an error of the thread.

        Each call raises the root cause anew. If threads shared one exception, its traceback would keep the frames of
        all of them, and so the process group that a frame of the connecting thread refers to.
        """
        self._thread.check()
        with self._changed:
            if self._state is State.FAILED:
                raise copy(self._root_cause or RuntimeError("rank 0 has failed, and the other ranks were terminated"))

    def wait_for_root_cause(self, timeout: float) -> RankError | None:
        """The failure of the rank that failed first; None if none has failed after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._state in (State.FAILED, State.CLOSED), timeout)
            return self._root_cause

    def stop(self) -> State:
        """Stop watching, since the workers are about to be asked to end. Returns STOPPING, FAILED or CLOSED."""
        return self._transition(State.STARTING, State.RUNNING, to=State.STOPPING)

    def fail(self) -> None:
        """Change to FAILED because rank 0 itself has failed. A root cause that is already known stays."""
        self._transition(State.STARTING, State.RUNNING, State.STOPPING, to=State.FAILED)

    def close(self) -> None:
        """Change to CLOSED: the workers have ended and their resources are freed."""
        if self._transition(*State, to=State.CLOSED) is State.CLOSED:
            self._wake.close()
            self._wake_sender.close()
            with self._changed:
                self._root_cause = None  # its traceback refers to the engine, which refers to this monitor

    def _transition(self, *states: State, to: State) -> State:
        """End the thread, then change from one of `states` to `to`. Returns the state."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._wake_sender.send(None)  # closing the pipe would not wake it while a forked process holds a copy
            self._thread.join()
        with self._changed:
            if self._state in states:
                self._state = to
            return self._state

    # --- the monitor's thread ---

    def _watch(self) -> None:
        ranks = {pipe: rank for rank, pipe in self._pipes.items()}
        num_starting = len(ranks)
        failures: dict[int, RankFailure | None] = {}  # None: the process ended without a report
        deadline = None
        while ranks and (deadline is None or time.monotonic() < deadline):
            timeout = None if deadline is None else max(0, deadline - time.monotonic())
            for pipe in connection.wait([*ranks, self._wake], timeout):
                if pipe is self._wake:
                    return
                report = None
                with suppress(EOFError, OSError):  # the process has ended
                    report = pipe.recv()  # type: ignore[union-attr]
                if report == READY:
                    num_starting -= 1
                    if num_starting == 0:
                        self._set_state(State.RUNNING)
                    continue
                failures[ranks.pop(pipe)] = report  # type: ignore[index]
                deadline = deadline or time.monotonic() + FAILURE_COLLECT_S
        self._terminate()
        root_cause = find_root_cause(failures, len(self._pipes) + 1, self._exit_code, num_starting > 0)
        self._set_state(State.FAILED, root_cause)
        self._unblock()

    def _set_state(self, state: State, root_cause: RankError | None = None) -> None:
        with self._changed:
            self._state, self._root_cause = state, root_cause
            self._changed.notify_all()


def find_root_cause(
    failures: Mapping[int, RankFailure | None], size: int, exit_code: Callable[[int], int | None], is_starting: bool
) -> RankError:
    """The failure that came first. A rank that ended without a report counts as earlier than those that report.

    failures: by rank. size: the number of ranks. is_starting: whether some worker was not READY yet.
    """
    for rank, failure in failures.items():
        if failure is None:
            return RankError(f"rank {rank} of {size} {_describe_exit(exit_code(rank), is_starting)}")
    reported = [(failure.time, rank, failure) for rank, failure in failures.items() if failure is not None]
    _, rank, failure = min(reported, key=lambda item: item[:2])
    return (RankValueError if failure.is_value_error else RankError)(failure.describe(rank, size))


def _describe_exit(code: int | None, is_starting: bool) -> str:
    if code is not None and code < 0:
        if code == -signal.SIGKILL:
            return "was killed by SIGKILL: by a user, or by the system when memory ran out"
        names = {number.value: number.name for number in signal.Signals}  # a real-time signal has none
        return f"was killed by {names.get(-code, f'signal {-code}')}; its own output may say more"
    if not is_starting:
        return f"ended with exit code {code} without an error message"
    return (
        f"ended with exit code {code} while it started; its own output says more. A program that starts an engine "
        'with several ranks does so under `if __name__ == "__main__":`, since the ranks import it too'
    )
