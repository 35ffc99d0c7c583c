"""RankPlacement: the device on which a rank computes, and how many ranks use that device's memory."""

from dataclasses import dataclass

import torch

from nanovllm.torchrun_env import TorchrunEnv


@dataclass(frozen=True)
class RankPlacement:
    """Rank `rank` of `size` computes on the GPU with index `gpu`, or on the CPU when `gpu` is None.

    num_ranks_per_device: ranks that use the same device's memory, this one included.
    """

    rank: int
    size: int
    num_ranks_per_device: int
    gpu: int | None = None

    @property
    def has_own_gpu(self) -> bool:
        return self.gpu is not None and self.num_ranks_per_device == 1

    def set_current_device(self) -> None:
        """Make the rank's GPU the current one of this thread. Call it before any other CUDA call."""
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)

    def initialize_device(self) -> None:
        """Create the CUDA context of the rank's GPU."""
        torch.cuda.synchronize()


def resolve_device(name: str) -> torch.device:
    """torch.device of Config.device; a GPU is the current one. Raises ValueError for cuda where torch finds no GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if _is_gpu(name) else torch.device("cpu")


def _is_gpu(name: str) -> bool:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("device must be 'cpu' on a machine where torch finds no GPU, got 'cuda'; use 'auto' or 'cpu'")
    return name != "cpu" and has_cuda


def local_placements(device: torch.device, size: int) -> list[RankPlacement]:
    """Placements of `size` ranks on this machine; GPUs are assigned in turn, beginning with rank 0's device."""
    if device.type == "cpu":
        return [RankPlacement(rank, size, num_ranks_per_device=size) for rank in range(size)]
    num_gpus, first = torch.cuda.device_count(), device.index
    return [RankPlacement(rank, size, -(-size // num_gpus), (first + rank) % num_gpus) for rank in range(size)]


def torchrun_placement(device_name: str, env: TorchrunEnv) -> RankPlacement:
    """Placement of a process that torchrun started: the GPU of its local rank. Initializes CUDA on no GPU."""
    if not _is_gpu(device_name):
        return RankPlacement(env.rank, env.size, num_ranks_per_device=env.local_size)
    num_gpus = torch.cuda.device_count()
    return RankPlacement(env.rank, env.size, -(-env.local_size // num_gpus), env.local_rank % num_gpus)
