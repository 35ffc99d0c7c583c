"""The other ranks of this machine, as rank 0 sees them: it starts their processes, watches them and ends them.

A thread listens for their last words. When a rank has failed, it finds out which one and why, and kills them all: the
group is lost anyway. Rank 0, perhaps inside a collective that can never end, is let go then: by gloo when connections
close, by NCCL when the group is aborted.
"""

import multiprocessing.process
import os
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import connection
from multiprocessing.context import SpawnContext
from typing import Any

import torch

from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.worker.meeting import meet
from nanovllm.worker.process_group import FileStore, Place, abort, in_background, join
from nanovllm.worker.rank_process import READY, Model, RankReport, run_rank
from nanovllm.worker.shm_channel import ShmSender

GRACE_SECONDS = 0.5  # after the first failure, for the other ranks to say what they saw
PATIENCE_SECONDS = 5.0  # for the listening thread to explain what rank 0 ran into
END_SECONDS = 10.0  # for ranks to end by themselves before they are killed


_all_processes: "weakref.WeakSet[Any]" = weakref.WeakSet()  # of all engines of this process


def _disown_processes() -> None:
    """In a forked process: multiprocessing would terminate and join its parent's ranks when it exits."""
    multiprocessing.process._children.difference_update(_all_processes)  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_disown_processes)


class RankError(RuntimeError):
    """Another rank failed. The message names it and the cause, and holds its traceback."""


class RankValueError(RankError, ValueError):
    """Another rank failed with a ValueError: something that the user chose will not do."""


class LocalRanks:
    """The processes of places[1:]; rank 0, at places[0], is the caller. Nothing is left if the constructor fails."""

    def __init__(self, model: Model, places: list[Place]) -> None:
        self.place = places[0]
        self._tp: TensorParallel | None = None
        self._aborted: Future[Any] | None = None
        self._is_broken = False
        self._all_ready: Future[Any] = Future()
        self._failure: Future[Any] = Future()
        self._processes: list[Any] = []
        self._reports: dict[Any, int] = {}  # pipe -> rank
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._resources = ExitStack()
        try:
            self._start(model, places[1:])
        except BaseException:
            self.break_off()
            self.close()
            raise

    def _start(self, model: Model, places: list[Place]) -> None:
        context = SpawnContext()
        self._channel = ShmSender(len(places), context)
        self._resources.callback(self._channel.close)
        directory = tempfile.mkdtemp(prefix="nanovllm-")  # nobody but this user can enter it
        self._resources.callback(shutil.rmtree, directory, ignore_errors=True)
        self._store_path = os.path.join(directory, "store")
        self._wake, self._wake_sender = self._pipe(context)
        with _sigint_blocked():  # the processes inherit it: Ctrl-C is for rank 0, which ends them
            for place, receiver in zip(places, self._channel.receivers, strict=True):
                reports, their_end = self._pipe(context)
                self._reports[reports] = place.rank
                arguments = (model, place, self._store_path, receiver, their_end, os.getpid())
                process = context.Process(target=run_rank, args=arguments, daemon=True)
                process.start()
                self._processes.append(process)
                _all_processes.add(process)
                their_end.close()  # so that the pipe ends when the process does
        self._listener.start()

    def _pipe(self, context: SpawnContext) -> tuple[Any, Any]:
        """(receiver, sender)"""
        receiver, sender = context.Pipe(duplex=False)
        self._resources.callback(receiver.close)
        self._resources.callback(sender.close)
        return receiver, sender

    # --- what rank 0 does with them ---

    def connect(self) -> TensorParallel:
        """Rank 0's end of the group, once all have come. Raises RankError when one does not."""
        wait([self._all_ready, self._failure], return_when=FIRST_COMPLETED)
        self.check()
        store = FileStore(self._store_path, self.place.size)
        is_over = threading.Event()

        def check() -> None:
            if is_over.is_set():
                raise RuntimeError("nobody waits for the ranks to meet any more")

        # In a thread, since whoever waits for a rank that died waits too long, with NCCL perhaps for ever.
        joining = in_background(lambda: join(self.place, store, lambda place, store: meet(place, store, check)))
        try:
            wait([joining, self._failure], return_when=FIRST_COMPLETED)
            self.check()
            tp = joining.result()
        except BaseException:
            is_over.set()
            wait([joining], PATIENCE_SECONDS)
            del joining  # and its result: the traceback keeps this frame
            raise
        self._tp = tp
        self.check()  # the listening thread has not seen the group if a rank failed before
        return tp

    def send(self, batch: ScheduledBatch) -> None:
        """Let the other ranks compute `batch`. Raises RankError when one has failed."""
        self._channel.send(batch, self.check)

    def check(self) -> None:
        """Raise RankError if a rank has failed."""
        if self._failure.done():
            raise self._failure.result()

    def explain(self, error: BaseException) -> BaseException:
        """The failure of another rank, if rank 0's `error` can be its consequence and there was one; else `error`."""
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            done, _ = wait({self._failure}, PATIENCE_SECONDS)
            return self._failure.result() if done else error
        return error

    # --- the end ---

    def break_off(self) -> None:
        """Kill the ranks, whatever they do: the group is lost."""
        self._stop_listening()
        self._kill()
        self._abort()

    def say_end(self) -> None:
        """Ask the ranks to end by themselves, unless the group is lost."""
        self._stop_listening()
        deadline = time.monotonic() + END_SECONDS

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        if not self.is_broken:
            with suppress(TimeoutError):
                self._channel.send(None, check)

    @property
    def is_broken(self) -> bool:
        return self._is_broken or self._failure.done()

    def close(self) -> None:
        """Wait for the ranks that say_end has asked, kill those that do not end, and clear up."""
        deadline = time.monotonic() + (0 if self.is_broken else END_SECONDS)
        try:
            for process in self._processes:
                process.join(max(0, deadline - time.monotonic()))
        finally:  # also when a second Ctrl-C ends the waiting
            if self.is_broken:
                self._abort()
            self._kill()
            if self._aborted is not None:
                wait([self._aborted], END_SECONDS)
            for process in self._processes:
                if _exit_code(process) is not None:
                    process.close()
            self._resources.close()  # after the processes: nobody attaches to the segment any more
            self._tp = self._aborted = None

    def _abort(self) -> None:
        """Begin to close rank 0's end of the group, once."""
        if self._tp is not None and self._aborted is None:
            self._aborted = abort(self._tp)

    def _kill(self) -> None:
        self._is_broken = True
        for process in self._processes:
            process.kill()  # reaches a stopped process too; one that has ended is left alone

    # --- the listening thread ---

    def _stop_listening(self) -> None:
        if self._listener.is_alive():
            self._wake_sender.send(None)  # closing it would not do: a forked process may hold it open
            self._listener.join()

    def _listen(self) -> None:
        """Until woken, or until a rank fails: then say why in self._failure."""
        pipes = dict(self._reports)
        num_ready = 0
        last_words: dict[int, RankReport | None] = {}  # rank -> report; None if it ended without
        deadline = None
        while pipes and (deadline is None or time.monotonic() < deadline):
            timeout = None if deadline is None else max(0, deadline - time.monotonic())
            for pipe in connection.wait([*pipes, self._wake], timeout):
                if pipe is self._wake:
                    return
                report = _receive(pipe)
                if report == READY:
                    num_ready += 1
                    if num_ready == len(self._reports):
                        self._all_ready.set_result(None)
                    continue
                del pipes[pipe]
                last_words[self._reports[pipe]] = report
                deadline = deadline or time.monotonic() + GRACE_SECONDS
        self._kill()
        # Before rank 0 is let go: it must not take for a result what a broken collective left.
        self._failure.set_result(self._cause(last_words))
        if self._tp is not None and self._tp.is_nccl:
            self._abort()  # nothing else ends a kernel that waits for other GPUs

    def _cause(self, last_words: dict[int, RankReport | None]) -> RankError:
        """Of several failures the first; a rank that died without a word came before those that noticed."""
        size = self.place.size
        for rank, report in last_words.items():
            if report is None:
                return RankError(f"rank {rank} of {size} {self._how_it_ended(rank)}")
        reports = [(report.time, rank, report) for rank, report in last_words.items() if report is not None]
        _, rank, report = min(reports, key=lambda item: item[:2])
        kind = RankValueError if report.is_value_error else RankError
        return kind(f"rank {rank} of {size} failed: {report.cause}\n\nIts traceback:\n{report.traceback}")

    def _how_it_ended(self, rank: int) -> str:
        code = _exit_code(self._processes[rank - 1])
        if code is not None and code < 0:
            return f"was killed by {_signal_name(-code)}: by hand, or by the system for want of memory"
        if self._all_ready.done():
            return f"ended with exit code {code} and said nothing"
        return (
            f"ended with exit code {code} while it started; its own output says more. A program that starts an engine "
            'with several ranks does so under `if __name__ == "__main__":`, since the ranks import it too'
        )


def _exit_code(process: Any) -> int | None:
    """Of a process that has ended or is about to; None if somebody else has asked the system for it."""
    deadline = time.monotonic() + END_SECONDS
    process.join(END_SECONDS)
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)  # another thread has asked (multiprocessing.active_children() does), and will tell
    return process.exitcode


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _receive(pipe: Any) -> Any:
    """READY, a RankReport, or None when the process has ended."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
