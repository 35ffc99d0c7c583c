"""Where each rank computes, and how the ranks find and leave each other."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.torchrun import Launch

dist: Any = torch.distributed  # its type stubs lack what its documentation has
FileStore, PrefixStore = dist.FileStore, dist.PrefixStore

# A rank that is only slow is waited for, however long; one that has gone is noticed by other means.
FOR_EVER = timedelta(days=365)
REMOTE_MEETING = timedelta(minutes=30)  # of machines, which may be minutes apart
LAUNCH_SECONDS = 1.0  # for a collective that is being launched when the group is aborted


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `size` computes on the GPU with index `gpu`, or on the CPU when that is None.

    num_sharing: ranks that share the memory it computes in.
    """

    rank: int
    size: int
    num_sharing: int
    gpu: int | None = None

    @property
    def has_own_gpu(self) -> bool:
        return self.gpu is not None and self.num_sharing == 1

    def enter(self) -> None:
        """Make its GPU this thread's current one, before anything else touches a GPU."""
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)


def resolve_device(name: str) -> torch.device:
    """torch.device of Config.device: a GPU is the current one. Raises ValueError for cuda where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if _is_gpu(name) else torch.device("cpu")


def _is_gpu(name: str) -> bool:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("device must be 'cpu' on a machine where torch finds no GPU, got 'cuda'; use 'auto' or 'cpu'")
    return name != "cpu" and has_cuda


def local_places(device: torch.device, size: int) -> list[Place]:
    """Places of `size` ranks on this machine, from rank 0's device on."""
    if device.type == "cpu":
        return [Place(rank, size, num_sharing=size) for rank in range(size)]
    num_gpus, first = torch.cuda.device_count(), device.index
    num_sharing = -(-size // num_gpus)
    return [Place(rank, size, num_sharing, (first + rank) % num_gpus) for rank in range(size)]


def launched_place(device_name: str, launch: Launch) -> Place:
    """The place of a process that torchrun started; does not touch a GPU that is not its own."""
    if not _is_gpu(device_name):
        return Place(launch.rank, launch.size, num_sharing=launch.local_size)
    num_gpus = torch.cuda.device_count()
    return Place(launch.rank, launch.size, -(-launch.local_size // num_gpus), launch.local_rank % num_gpus)


def gloo(place: Place, store: Any) -> Any:
    """A gloo group of all ranks, which may be on several machines.

    It listens where GLOO_SOCKET_IFNAME says, or at the machine's name.
    """
    group = dist.ProcessGroupGloo(store, place.rank, place.size, REMOTE_MEETING)
    group._set_default_timeout(FOR_EVER)
    return group


def nccl(place: Place, store: Any) -> Any:
    """An NCCL group of all ranks, each of which has its own GPU."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = FOR_EVER
    return dist.ProcessGroupNCCL(store, place.rank, place.size, options)


def join(place: Place, store: Any, connect: Callable[[Place, Any], Any]) -> TensorParallel:
    """This rank's end of a new group, once every rank has come.

    connect: makes the group of all ranks, from place and store: gloo, nccl or meet; the same on all ranks.
    """
    place.enter()
    tp = TensorParallel(place.rank, place.size, connect(place, store))
    tp.minimum(0)  # NCCL connects in the first collective: let that be here
    return tp


def leave(tp: TensorParallel) -> None:
    """Close this rank's end, as all ranks do; graphs that recorded its collectives must be gone."""
    tp.group.shutdown()


def abort(tp: TensorParallel) -> "Future[Any]":
    """Begin to close this rank's end of a group that others have left, and to let go who waits for them in it. Whoever
    uses it now or later gets a RuntimeError.

    Done when the graphs that recorded NCCL's collectives are gone, too: for those it waits, in a thread of its own, so
    that whoever holds them can be let go first.
    """

    def close() -> None:
        tp.gate.close(LAUNCH_SECONDS)
        tp.group.abort()

    return in_background(close)


def in_background(work: Callable[[], Any]) -> "Future[Any]":
    """What `work` returns or raises, in a thread that nobody waits for when the interpreter ends."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result
