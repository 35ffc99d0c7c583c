"""Tensor parallelism: which share of every matrix this rank holds, and how the ranks add up what they computed."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


class Gate:
    """Open while collectives may be launched. Whoever launches one does it inside `with gate`.

    NCCL takes for granted that a group which is being aborted gets no more work: it frees what the work would use. But
    here one thread launches, and another aborts when a rank has failed.
    """

    def __init__(self) -> None:
        self._is_passed = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> None:
        self._is_passed.acquire()
        if self._is_closed:
            self._is_passed.release()
            raise RuntimeError("the ranks' group has been aborted: one of them has failed")

    def __exit__(self, *_: object) -> None:
        self._is_passed.release()

    def close(self, timeout: float) -> None:
        """From now on entering raises RuntimeError. Waits, timeout seconds at most, until nobody is inside: a launch
        waits for the GPU when that has very many before it, which may be for the one who calls this.
        """
        is_free = self._is_passed.acquire(timeout=timeout)
        self._is_closed = True
        if is_free:
            self._is_passed.release()


@dataclass(frozen=True)
class TensorParallel:
    """This process is `rank` of `size`.

    group: what several ranks talk over, a gloo or NCCL backend of torch.distributed. It belongs to one engine, and is
    not torch's default group: neither another engine nor the user's program can meet it. gate: closed before it ends.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    gate: Gate = field(default_factory=Gate, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be from 0 to size - 1 and size at least 1, got rank={self.rank}, {self.size=}")

    @property
    def is_nccl(self) -> bool:
        return self.group is not None and self.group.name() == "nccl"

    @property
    def is_graph_safe(self) -> bool:
        """Whether a CUDA graph can record what the ranks say to each other: gloo copies through the host."""
        return self.size == 1 or self.is_nccl

    def share(self, name: str, value: int) -> int:
        """value / size. Raises ValueError, naming `name`, when it is not an integer."""
        if value % self.size:
            raise ValueError(f"{name} must be divisible by the tensor-parallel size {self.size}, got {value}")
        return value // self.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' x, on every rank. May reuse x's memory: pass a tensor that nothing else needs."""
        if self.size > 1:
            self._launch(self.group.allreduce, [x]).wait()
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """The ranks' x side by side along the last dimension, in rank order, on rank 0; None on the others."""
        if self.size == 1:
            return x
        part = x.contiguous()  # neither backend takes anything else
        if not self.is_nccl:
            part = part.cpu()  # gloo gathers nothing else
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        options = dist.GatherOptions()
        options.rootRank = 0
        self._launch(self.group.gather, [parts] if parts is not None else [], [part], options).wait()
        return torch.cat(parts, dim=-1).to(x.device) if parts is not None else None

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' values, on every rank. Waits for all of them."""
        if self.size == 1:
            return value
        smallest = torch.tensor([value], dtype=torch.int64, device="cuda" if self.is_nccl else "cpu")
        self._launch(self.group.allreduce, [smallest], dist.ReduceOp.MIN).wait()
        return int(smallest)

    def _launch(self, collective: Callable[..., Any], *arguments: Any) -> Any:
        """The work that was begun. Raises RuntimeError when the group has been aborted."""
        with self.gate:
            return collective(*arguments)


SINGLE_RANK = TensorParallel()
