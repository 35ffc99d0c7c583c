"""Tensor parallelism: which share of every matrix this rank holds, and how the ranks add up what they computed."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TensorParallel:
    """This process is `rank` of `size`. If there are several, torch.distributed must be initialised."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be from 0 to size - 1 and size at least 1, got rank={self.rank}, {self.size=}")

    def share(self, name: str, value: int) -> int:
        """value / size. Raises ValueError, naming `name`, when it is not an integer."""
        if value % self.size:
            raise ValueError(f"{name} must be divisible by the tensor-parallel size {self.size}, got {value}")
        return value // self.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' x, on every rank. May reuse x's memory: pass a tensor that nothing else needs."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """The ranks' x side by side along the last dimension, in rank order, on rank 0; None on the others."""
        if self.size == 1:
            return x
        x = x.contiguous()  # NCCL takes nothing else
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, dst=0)
        return torch.cat(parts, dim=-1) if parts is not None else None


SINGLE_RANK = TensorParallel()
