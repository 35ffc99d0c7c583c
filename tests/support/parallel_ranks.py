"""Tensor-parallel ranks without processes: several ranks in one test, alone or in threads."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from tests.support.limits import HANG_SECONDS

Item = TypeVar("Item")
Result = TypeVar("Result")


class PartialRank(TensorParallel):
    """A rank whose all_reduce returns its own summand: the test adds up."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


def partial_ranks(size: int) -> list[PartialRank]:
    return [PartialRank(rank, size) for rank in range(size)]


@dataclass(frozen=True)
class ThreadedRank(TensorParallel):
    """A rank in a thread. `parts` holds the tensors of all ranks between two waits at the barrier."""

    barrier: Any = None
    parts: list[Any] = field(default_factory=list)

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        self.parts[self.rank] = part
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x))

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        parts = self._exchange(x)
        return torch.cat(parts, dim=-1) if self.rank == 0 else None


def threaded_ranks(size: int) -> list[TensorParallel]:
    barrier, parts = threading.Barrier(size, timeout=HANG_SECONDS), [None] * size
    return [ThreadedRank(rank, size, barrier=barrier, parts=parts) for rank in range(size)]


def run_together(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """work(item) of all items at once, one thread each, in order."""
    with ThreadPoolExecutor(len(items)) as threads:
        return list(threads.map(work, items))
