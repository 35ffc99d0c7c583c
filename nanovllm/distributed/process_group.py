"""Creation, orderly destruction and abort of the ranks' process group, a gloo or NCCL backend of torch.distributed."""

import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed

from nanovllm.distributed.peer_memory import connect_peer_memory
from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.tensor_parallel import TensorParallel

dist: Any = torch.distributed  # its type stubs lack classes that its documentation has
FileStore, PrefixStore = dist.FileStore, dist.PrefixStore

NO_TIMEOUT = timedelta(days=365)  # a slow rank is waited for; a failed rank is detected by other means
REMOTE_CONNECT_TIMEOUT = timedelta(minutes=30)  # the machines' programs may be started minutes apart
MAX_SECONDS_TO_BEGIN = 1.0  # of a new thread; if Ctrl-C came early, there is none
ABORT_DRAIN_TIMEOUT_S = 1.0  # for a collective that is being launched when the group is aborted


def new_gloo_group(placement: RankPlacement, store: Any) -> Any:
    """A gloo group of all ranks, on one or several machines. It listens on the interface GLOO_SOCKET_IFNAME, or on the
    address of the machine's name.
    """
    group = dist.ProcessGroupGloo(store, placement.rank, placement.size, REMOTE_CONNECT_TIMEOUT)
    group._set_default_timeout(NO_TIMEOUT)
    return group


def new_nccl_group(placement: RankPlacement, store: Any) -> Any:
    """An NCCL group of all ranks, each of which has a GPU of its own."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = NO_TIMEOUT
    return dist.ProcessGroupNCCL(store, placement.rank, placement.size, options)


def init_process_group(
    placement: RankPlacement, store: Any, new_group: Callable[[RankPlacement, Any], Any]
) -> TensorParallel:
    """This rank's end of a new group; returns when every rank has connected.

    new_group: makes the group of all ranks from placement and store: new_gloo_group, new_nccl_group or rendezvous; the
        same on all ranks.
    """
    placement.set_current_device()
    tp = TensorParallel(placement.rank, placement.size, new_group(placement, store))
    tp.barrier()  # NCCL connects in the first collective
    return replace(tp, peers=connect_peer_memory(tp)) if tp.is_nccl else tp


def destroy_process_group(tp: TensorParallel) -> None:
    """Close this rank's end; all ranks do. Before, free the CUDA graphs that recorded the group's collectives."""
    tp.group.shutdown()
    tp.close_peers()


def abort_process_group(tp: TensorParallel) -> "DaemonThread":
    """Start to abort this rank's end of a group in which a rank has failed: collectives raise RuntimeError from now on,
    and those that wait return. tp.peers stays open, since graphs use it: close it when they are freed.

    The thread ends when the abort has ended. NCCL's waits until the CUDA graphs that recorded its collectives are
    freed, so it runs in a thread of its own while the caller frees them.
    """
    thread = DaemonThread(partial(_abort, tp))
    thread.start()
    return thread


def _abort(tp: TensorParallel) -> None:
    if tp.peers is not None:
        tp.peers.abort()
    tp.guard.close(ABORT_DRAIN_TIMEOUT_S)
    tp.group.abort()


class DaemonThread(threading.Thread):
    """A thread that calls work(). The interpreter exits without waiting for it.

    When it has ended, neither it nor the traceback of its error refers to what `work` used, unless `work` is a closure:
    a traceback keeps those of its functions.

    If Ctrl-C interrupts start() or join(), the thread has begun, and join() still waits for its end. Neither holds of
    Python's own threads: before 3.13, one whose join() was interrupted counts as ended.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(target=work, daemon=True)
        self._error: BaseException | None = None
        self._has_begun, self._has_ended = threading.Event(), threading.Event()

    def start(self) -> None:
        try:
            super().start()
        except KeyboardInterrupt:
            self._has_begun.wait(MAX_SECONDS_TO_BEGIN)
            raise

    def join(self, timeout: float | None = None) -> None:
        if self._has_ended.wait(timeout):
            super().join()

    def run(self) -> None:
        self._has_begun.set()
        try:
            super().run()  # drops its reference to work
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self._error = error
        finally:
            self._has_ended.set()

    def check(self) -> None:
        """Raise what work() raised, if the thread has ended."""
        if self._error is not None:
            raise self._error
