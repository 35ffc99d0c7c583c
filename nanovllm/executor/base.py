"""Executor: the interface through which LLMEngine runs a step, and the choice of an implementation. No torch."""

import gc
import os
import traceback
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

from nanovllm.config import Config
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.model_config import ModelConfig
from nanovllm.torchrun_env import read_torchrun_env


class RankError(RuntimeError):
    """Another rank failed. The message names it and the cause, and contains its traceback."""


class RankValueError(RankError, ValueError):
    """Another rank failed with a ValueError: a value that the user chose cannot be used."""


class PendingTokens(Protocol):
    """The new tokens of a submitted step, which the device may still be computing."""

    @property
    def batch(self) -> ScheduledBatch: ...

    def token_ids(self) -> list[int]:
        """The new token ids of batch.sampled_sequences, in their order. Blocks until they are computed."""
        ...


class Executor(ABC):
    """Runs scheduled batches.

    num_kv_cache_blocks, kv_cache_block_size: KV blocks that were allocated, on every rank, and their tokens.
    supports_async_scheduling: whether execute() returns before the step is computed, so that scheduling the next step
        meanwhile saves time.
    """

    num_kv_cache_blocks: int
    kv_cache_block_size: int
    supports_async_scheduling: bool

    @abstractmethod
    def execute(self, batch: ScheduledBatch, previous: PendingTokens | None = None) -> PendingTokens:
        """Submit `batch`.

        previous: the step submitted last, when `batch` was scheduled before its tokens were known. Its sampled tokens
            become input ids on the device.
        Raises RuntimeError when the executor is closed. With several ranks any exception, from token_ids() too and
        KeyboardInterrupt included, closes the executor, because the ranks may no longer be at the same step; RankError
        when another rank has failed.
        """

    @property
    @abstractmethod
    def is_closed(self) -> bool: ...

    @abstractmethod
    def close(self) -> None:
        """Free memory, end processes. May be called again, and after a failure."""


def make_executor(config: Config, model_config: ModelConfig, model_dir: Path, owner: object) -> Executor:
    """The executor for config.tensor_parallel_size ranks. It is closed at the latest when `owner` is garbage collected
    and when the interpreter exits, but not in a forked child, since ranks and shared memory belong to the parent.

    Under torchrun it does not return on ranks other than 0: they compute what rank 0 sends until rank 0 ends, and raise
    SystemExit. Raises ValueError for a model, device or memory that cannot be used, and RankError when another rank
    fails. A failed start leaves nothing behind.
    """
    executor = _start(config, model_config, model_dir)
    weakref.finalize(owner, _close_in_own_process, os.getpid(), executor)
    return executor


def _start(config: Config, model_config: ModelConfig, model_dir: Path) -> Executor:
    # Modules that import torch are imported here, because `import nanovllm` must not import torch.
    import nanovllm.distributed  # noqa: F401  (before the others, because it sets OpenMP's wait policy)

    if config.tensor_parallel_size == 1:
        from nanovllm.executor.uniproc import UniprocExecutor

        return UniprocExecutor(config, model_config, model_dir)
    from nanovllm.executor.worker_main import WorkerSpec

    spec, env = WorkerSpec(config, model_config, model_dir), read_torchrun_env()
    if env is None:
        from nanovllm.executor.multiproc import MultiprocExecutor

        return MultiprocExecutor(spec)
    if env.size != config.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size must be the number of processes that torchrun started, {env.size}, got "
            f"{config.tensor_parallel_size}; set it to {env.size}, or change --nnodes and --nproc-per-node"
        )
    from nanovllm.executor.torchrun import TorchrunExecutor, run_torchrun_worker

    if env.rank > 0:
        run_torchrun_worker(spec, env)
        raise SystemExit(0)
    return TorchrunExecutor(spec, env)


def _close_in_own_process(pid: int, executor: Executor) -> None:
    if os.getpid() == pid:
        executor.close()


def free_frames(error: BaseException) -> None:
    """Free what the local variables of the error's finished frames hold: weights, cache, graphs, activations.

    A caller that keeps the error keeps its traceback and those of the errors that it followed from, and the abort of an
    NCCL group waits for the graphs to be freed.
    """
    seen: list[BaseException] = []
    followed_from: BaseException | None = error
    while followed_from is not None and followed_from not in seen:
        seen.append(followed_from)
        traceback.clear_frames(followed_from.__traceback__)
        followed_from = followed_from.__cause__ or followed_from.__context__
    gc.collect()  # modules refer to each other in cycles
