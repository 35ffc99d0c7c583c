"""Tensor-parallel ranks without processes: several ranks in one test, alone, in threads, or over gloo."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.process_group import FileStore, destroy_process_group, init_process_group
from nanovllm.distributed.rendezvous import rendezvous
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


def run_over_gloo(directory: Path, work: Callable[[TensorParallel], Result]) -> list[Result]:
    """work(tp) of two ranks in threads, which meet in a file in `directory`."""

    def join_and_work(rank: int) -> Result:
        store = FileStore(str(directory / "store"), 2)
        tp = init_process_group(RankPlacement(rank, 2, num_ranks_per_device=2), store, rendezvous)
        result = work(tp)
        destroy_process_group(tp)
        return result

    return run_together(join_and_work, [0, 1])


def run_together(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """work(item) of all items at once, one thread each, in order."""
    with ThreadPoolExecutor(len(items)) as threads:
        return list(threads.map(work, items))
