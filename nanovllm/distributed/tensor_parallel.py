"""Tensor parallelism: which slice of every matrix a rank holds, and the collectives that combine the ranks' results."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.distributed.peer_memory import PeerMemory


class CollectiveGuard:
    """Mutual exclusion of launching a collective (`with guard:`) and aborting the group (`guard.close()`).

    NCCL frees communicator state during an abort; launching a collective concurrently is undefined. One thread
    launches, and another aborts when a rank has failed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._is_closed:
            self._lock.release()
            raise RuntimeError("the ranks' process group has been aborted, since one of the ranks has failed")

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def close(self, timeout: float) -> None:
        """Make `with guard` raise RuntimeError from now on. Waits up to `timeout` seconds for a launch in progress: a
        launch blocks while the GPU's queue is full, and then perhaps until the abort.
        """
        is_acquired = self._lock.acquire(timeout=timeout)
        self._is_closed = True
        if is_acquired:
            self._lock.release()


@dataclass(frozen=True)
class TensorParallel:
    """This process is `rank` of `size`.

    group: a gloo or NCCL backend of torch.distributed; None with one rank. It belongs to one engine and is not torch's
        default group, so neither another engine nor the user's program uses it.
    guard: closed before the group is aborted.
    peers: memory into which the ranks' kernels write; None where they cannot, and with one rank.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    guard: CollectiveGuard = field(default_factory=CollectiveGuard, repr=False, compare=False)
    peers: PeerMemory | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be from 0 to size - 1 and size at least 1, got rank={self.rank}, {self.size=}")

    @property
    def is_nccl(self) -> bool:
        return self.group is not None and self.group.name() == "nccl"

    @property
    def is_graph_safe(self) -> bool:
        """Whether a CUDA graph can record the collectives: gloo copies through the host, so its cannot be recorded."""
        return self.size == 1 or self.is_nccl

    def divide(self, name: str, value: int) -> int:
        """value / size. Raises ValueError, naming `name`, when it is not an integer."""
        if value % self.size:
            raise ValueError(f"{name} must be divisible by the tensor-parallel size {self.size}, got {value}")
        return value // self.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' x, on every rank. May overwrite x: pass a tensor that is not used afterwards."""
        if self.size > 1:
            self._launch(self.group.allreduce, [x]).wait()
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x, on every rank. The other ranks' x, of the same shape and dtype, is overwritten."""
        if self.size > 1:
            self._launch(self.group.broadcast, [x], dist.BroadcastOptions()).wait()  # rootRank is 0 by default
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """The ranks' x concatenated along the last dimension, in rank order, on rank 0; None on the others."""
        if self.size == 1:
            return x
        part = x.contiguous()  # both backends require it
        if not self.is_nccl:
            part = part.cpu()  # gloo gathers CPU tensors only
        outputs = [[torch.empty_like(part) for _ in range(self.size)]] if self.rank == 0 else []
        self._launch(self.group.gather, outputs, [part], dist.GatherOptions()).wait()  # rootRank is 0 by default
        return torch.cat(outputs[0], dim=-1).to(x.device) if outputs else None

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape], the ranks' x in rank order, on every rank. x: contiguous, of the same shape and dtype."""
        part = x.flatten() if self.is_nccl else x.flatten().cpu()
        parts = part.new_empty(self.size * x.numel())
        self._launch(self.group._allgather_base, parts, part).wait()  # as dist.all_gather_into_tensor does
        return parts.to(x.device).view(self.size, *x.shape)

    def all_reduce_min(self, value: int) -> int:
        """The minimum of the ranks' values, on every rank. Blocks until all ranks have called it."""
        if self.size == 1:
            return value
        minimum = torch.tensor([value], dtype=torch.int64, device="cuda" if self.is_nccl else "cpu")
        self._launch(self.group.allreduce, [minimum], dist.ReduceOp.MIN).wait()
        return int(minimum)

    def barrier(self) -> None:
        """Block until all ranks have called it."""
        self.all_reduce_min(0)

    def close_peers(self) -> None:
        """Free the memory that the ranks' kernels write into; free the CUDA graphs that use it before."""
        if self.peers is not None:
            self.peers.close()

    def _launch(self, collective: Callable[..., Any], *arguments: Any) -> Any:
        """The launched work. Raises RuntimeError when the group has been aborted."""
        with self.guard:
            return collective(*arguments)


SINGLE_RANK = TensorParallel()
