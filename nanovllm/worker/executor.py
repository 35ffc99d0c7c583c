"""Executor: runs scheduled batches on rank 0's ModelRunner and, with several ranks, on theirs."""

import gc
import os
import traceback
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from nanovllm.config import Config
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.model_config import ModelConfig
from nanovllm.torchrun import read_launch
from nanovllm.worker.launched_ranks import LaunchedRanks, serve_launched
from nanovllm.worker.launched_step import LaunchedStep
from nanovllm.worker.local_ranks import LocalRanks
from nanovllm.worker.main_program import require_importable_program
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.process_group import launched_place, leave, local_places, resolve_device
from nanovllm.worker.rank_process import Model


class Executor:
    """Owns the ModelRunner and the other ranks. When something fails, nothing of them is left.

    Under torchrun a process of another rank never gets an Executor: the constructor computes what rank 0 sends until
    rank 0 ends, and raises SystemExit.
    Raises ValueError for a model, device or memory that will not do, RankError when another rank fails.
    num_kv_cache_blocks: KV blocks that were allocated, on every rank. supports_async_scheduling: whether launch()
    returns before the step is computed, so that there is time to gain: with one rank, on a GPU.
    """

    def __init__(self, config: Config, model_config: ModelConfig, model_dir: Path) -> None:
        self._resources = ExitStack()  # closed in reverse order, also when this object or the interpreter ends
        self._finalizer = weakref.finalize(self, _close_in_own_process, os.getpid(), self._resources)
        self._ranks: LocalRanks | LaunchedRanks | None = None
        self._runner: ModelRunner | None = None
        try:
            self._runner = self._start(Model(config, model_config, model_dir))
        except BaseException as error:
            self._fail(error)
        self.num_kv_cache_blocks = self._runner.num_kv_cache_blocks
        self.supports_async_scheduling = self._ranks is None and self._runner.device.type == "cuda"

    def _start(self, model: Model) -> ModelRunner:
        if model.config.tensor_parallel_size == 1:
            runner = ModelRunner(model.config, model.model_config, model.model_dir)
        else:
            self._ranks = ranks = _other_ranks(model)
            self._resources.callback(ranks.close)
            tp = ranks.connect()
            self._resources.callback(lambda: None if ranks.is_broken else leave(tp))
            runner = ModelRunner(
                model.config, model.model_config, model.model_dir, tp, ranks.place.num_sharing, ranks.check
            )
        self._resources.callback(runner.close)
        if self._ranks is not None:
            self._resources.callback(self._ranks.say_end)
        return runner

    def run(self, batch: ScheduledBatch) -> list[int]:
        """Compute `batch`; the new token ids of batch.sampled_sequences, in their order.

        With several ranks, an exception (Ctrl-C too) ends the executor: they may have come different ways.
        """
        if self._runner is None:
            raise RuntimeError("the ranks of this engine have ended: make a new one")
        if self._ranks is None:
            return self._runner.run(batch)
        try:
            self._ranks.send(batch)
            token_ids = self._runner.run(batch)
            self._ranks.check()
            return token_ids
        except BaseException as error:
            self._fail(error)

    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None = None) -> LaunchedStep:
        """Begin to compute `batch`, as ModelRunner.launch. One rank only."""
        if self._runner is None:
            raise RuntimeError("this engine is closed: make a new one")
        return self._runner.launch(batch, before)

    @property
    def is_closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """Give memory and processes back. May be called twice."""
        self._runner = None
        self._finalizer()

    def _fail(self, error: BaseException) -> NoReturn:
        """Close, and raise what really happened."""
        cause = error
        try:
            if self._ranks is not None:
                cause = self._ranks.explain(error)
        finally:  # also when Ctrl-C ends the waiting for an explanation
            if self._ranks is not None:
                self._ranks.break_off()
            # Whoever keeps the error keeps its traceback, and with it would keep weights, cache, sockets, and graphs,
            # without whose end NCCL does not end. Of a runner that was not finished nothing else holds them.
            traceback.clear_frames(error.__traceback__)
            gc.collect()  # modules refer to each other in cycles
            self.close()
        if cause is error:
            raise error
        raise cause from error


def _close_in_own_process(pid: int, resources: ExitStack) -> None:
    """Nothing in a process that was forked from the engine's: ranks, group and shared memory are its parent's."""
    if os.getpid() == pid:
        resources.close()


def _other_ranks(model: Model) -> LocalRanks | LaunchedRanks:
    """Started or found; does not return in another rank of torchrun's. Raises ValueError for a device that is not there
    and when torchrun started more or fewer ranks than were asked for.
    """
    size, launch = model.config.tensor_parallel_size, read_launch()
    if launch is None:
        require_importable_program()
        return LocalRanks(model, local_places(resolve_device(model.config.device), size))
    if launch.size != size:
        raise ValueError(
            f"tensor_parallel_size must be the number of processes that torchrun started, {launch.size}, got {size}; "
            f"set it to {launch.size}, or change --nnodes and --nproc-per-node"
        )
    place = launched_place(model.config.device, launch)
    if place.rank:
        serve_launched(model, place)
        raise SystemExit(0)
    return LaunchedRanks(place)
