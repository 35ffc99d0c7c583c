"""MultiprocExecutor: runs rank 0 in this process, and starts, monitors and ends a worker process per other rank.

If a rank fails, the process group is unusable, and the FailureMonitor terminates all workers. Rank 0 may be inside a
collective that never completes. Closed connections unblock it with gloo, and aborting the communicator with NCCL.
"""

import multiprocessing.process
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from typing import Any

from nanovllm.distributed.message_queue import CHECK_INTERVAL_S, MessageQueueWriter
from nanovllm.distributed.placement import local_placements, resolve_device
from nanovllm.distributed.process_group import DaemonThread
from nanovllm.executor.failure_monitor import FailureMonitor
from nanovllm.executor.multi_rank import ROOT_CAUSE_TIMEOUT_S, SHUTDOWN_TIMEOUT_S, MultiRankExecutor
from nanovllm.executor.worker_main import StepMessage, WorkerSpec, join_local_group, worker_main

_all_processes: "weakref.WeakSet[Any]" = weakref.WeakSet()  # workers of all engines of this process


def _disown_processes() -> None:
    """Remove the workers from multiprocessing's list of child processes. Called in a forked process.

    Otherwise the forked process would terminate and join its parent's workers when it exits.
    """
    multiprocessing.process._children.difference_update(_all_processes)  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_disown_processes)


class MultiprocExecutor(MultiRankExecutor):
    """Executor of several ranks on one host, all of them started by this process.

    Raises ValueError for a device that does not exist or a program that the workers cannot import.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        require_importable_program()
        placement, *self._worker_placements = local_placements(
            resolve_device(spec.config.device), spec.config.tensor_parallel_size
        )
        self._processes: list[Any] = []  # those of ranks 1, 2, ..., in this order
        self._connecting: DaemonThread | None = None
        context = SpawnContext()
        with ExitStack() as stack:
            self._queue = MessageQueueWriter(len(self._worker_placements), context)
            stack.callback(self._queue.close)
            directory = tempfile.mkdtemp(prefix="nanovllm-")  # with mode 0700: other users cannot open it
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            self._store_path = os.path.join(directory, "store")
            receivers: dict[int, Connection] = {}
            self._senders: dict[int, Connection] = {}
            for worker in self._worker_placements:
                ends = map(stack.enter_context, context.Pipe(duplex=False))
                receivers[worker.rank], self._senders[worker.rank] = ends
            monitor = FailureMonitor(
                receivers, lambda rank: _exit_code(self._processes[rank - 1]), self._kill_workers, self._unblock
            )
            stack.callback(monitor.close)
            self._resources = stack.pop_all()  # _release() closes them after the processes have ended
        super().__init__(spec, placement, monitor)

    def _connect(self, spec: WorkerSpec) -> None:
        self._start_workers(spec)
        # _join_group runs in a thread, because connecting to a rank that has died cannot be interrupted.
        self._connecting = DaemonThread(self._join_group)
        self._connecting.start()  # once it is stored: _release() waits for it after Ctrl-C
        while self._connecting.is_alive():
            self._connecting.join(CHECK_INTERVAL_S)
            self._monitor.check()
        self._connecting.check()
        self._connecting = None
        self._monitor.check()  # a rank may have failed before the monitor's thread could abort self._tp

    def _join_group(self) -> None:
        self._tp = join_local_group(self._placement, self._store_path, self._monitor.check)

    def _start_workers(self, spec: WorkerSpec) -> None:
        context = SpawnContext()
        # Workers inherit the signal mask: rank 0 handles Ctrl-C and ends them.
        signal_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for placement, reader in zip(self._worker_placements, self._queue.readers, strict=True):
                sender = self._senders[placement.rank]
                arguments = (spec, placement, self._store_path, reader, sender, os.getpid())
                process = context.Process(target=worker_main, args=arguments, daemon=True)
                process.start()
                self._processes.append(process)
                _all_processes.add(process)
                sender.close()  # only the worker has this end now, so the pipe closes when the worker exits
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask)

    # --- a step ---

    def _send(self, message: StepMessage) -> None:
        self._queue.enqueue(message, self._monitor.check)

    # --- failures ---

    def _kill_workers(self) -> None:
        for process in self._processes:
            process.kill()  # SIGKILL ends suspended processes too, and has no effect on one that has ended

    def _unblock(self) -> None:
        if self._tp is not None and self._tp.is_nccl:
            self._abort_group()  # only an abort ends an NCCL kernel that waits for other GPUs

    # --- shutdown ---

    def _request_shutdown(self) -> None:
        self._shutdown_deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S

        def check() -> None:
            if time.monotonic() > self._shutdown_deadline:
                raise TimeoutError

        with suppress(TimeoutError):  # _release() kills workers that have not read the request
            self._queue.enqueue(None, check)

    def _wait_for_workers(self) -> None:
        for process in self._processes:
            process.join(max(0, self._shutdown_deadline - time.monotonic()))

    def _release(self) -> None:
        self._kill_workers()
        if self._connecting is not None:
            if self._connecting.is_alive():  # else Ctrl-C kept it from being started
                self._connecting.join(ROOT_CAUSE_TIMEOUT_S)
            self._connecting = None
            self._abort_group()  # the ranks may have connected since _terminate()
        for process in self._processes:
            if _exit_code(process) is not None:
                process.close()
        self._processes.clear()
        self._resources.close()


def require_importable_program() -> None:
    """Raise ValueError when `__main__` has a file that does not exist, as with `python - <<EOF`.

    A spawned process imports the file of `__main__` first. Programs without one (python -c, a notebook, the interactive
    interpreter) are not imported, and modules (python -m) are found by their names.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is not None or path is None:
        return
    if not os.path.isabs(path):  # as multiprocessing resolves it
        path = os.path.join(getattr(multiprocessing.process, "ORIGINAL_DIR", None) or "", path)
    if not os.path.isfile(path):
        raise ValueError(
            "a program that starts an engine with tensor_parallel_size above 1 must be a file, since the processes of "
            f"the other ranks import it, got {main.__file__!r}; save it to a file and start the engine there under "
            '`if __name__ == "__main__":`'
        )


def _exit_code(process: Any) -> int | None:
    """Exit code of a process that has ended or is about to end; None if another waitpid() call reaped it."""
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
    process.join(SHUTDOWN_TIMEOUT_S)
    while process.exitcode is None and time.monotonic() < deadline:
        # Another thread has reaped the process, as multiprocessing.active_children() does, and will store exitcode.
        time.sleep(0.01)
    return process.exitcode
