"""Tensor-parallel ranks without their processes: several ranks' layers in one test."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nanovllm.layers.tensor_parallel import TensorParallel
from tests.support.limits import HANG_SECONDS

Item = TypeVar("Item")
Result = TypeVar("Result")


class PartialRank(TensorParallel):
    """A rank that keeps its summand or its part to itself: the test adds up or joins."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


def partial_ranks(size: int) -> list[PartialRank]:
    return [PartialRank(rank, size) for rank in range(size)]


class _Exchange:
    """Where the threads of one group lay out their tensors for the others."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=HANG_SECONDS)
        self.parts: list[Any] = [None] * size

    def all_parts(self, rank: int, part: torch.Tensor) -> list[torch.Tensor]:
        self.parts[rank] = part
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()  # nobody lays out the next tensor before all have read this one
        return parts


@dataclass(frozen=True)
class ThreadedRank(TensorParallel):
    """A rank that lives in a thread and meets the others at a barrier."""

    exchange: _Exchange | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert self.exchange is not None
        return torch.stack(self.exchange.all_parts(self.rank, x)).sum(0)

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        assert self.exchange is not None
        parts = self.exchange.all_parts(self.rank, x)
        return torch.cat(parts, dim=-1) if self.rank == 0 else None


def threaded_ranks(size: int) -> list[TensorParallel]:
    exchange = _Exchange(size)
    return [ThreadedRank(rank, size, exchange=exchange) for rank in range(size)]


def run_together(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """work(item) of all items at once, one thread each, in order. Items hold the ranks of one threaded_ranks()."""
    with ThreadPoolExecutor(len(items)) as threads:
        return list(threads.map(work, items))
