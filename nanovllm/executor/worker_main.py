"""The process of a rank other than 0: join the group, load this rank's shard, compute the steps that rank 0 sends."""

import gc
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nanovllm.config import Config
from nanovllm.distributed.message_queue import MessageQueueReader
from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.process_group import FileStore, destroy_process_group, init_process_group
from nanovllm.distributed.rendezvous import rendezvous
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.executor.failure_monitor import READY, RankFailure
from nanovllm.model_config import ModelConfig
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.torch_state import gpu_lock

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence

PARENT_POLL_S = 0.5
EXIT_DELAY_S = 5.0  # of a rank that has failed; longer than PARENT_POLL_S


@dataclass(frozen=True)
class WorkerSpec:
    """What every rank needs to load its shard of the model."""

    config: Config
    model_config: ModelConfig
    model_dir: Path

    def make_runner(
        self, placement: RankPlacement, tp: TensorParallel, check: Callable[[], None] | None = None
    ) -> ModelRunner:
        """check: called repeatedly while weights are loaded; may raise."""
        num_ranks = placement.num_ranks_per_device
        return ModelRunner(self.config, self.model_config, self.model_dir, tp, num_ranks, check)


@dataclass(frozen=True)
class StepMessage:
    """A step that rank 0 sends.

    previous_sequences: as in ModelRunner.run. Those in batch.sequences are the same objects there, also when unpickled.
    """

    batch: ScheduledBatch
    previous_sequences: "tuple[Sequence, ...] | None" = None


def worker_main(
    spec: WorkerSpec,
    placement: RankPlacement,
    store_path: str,
    queue: MessageQueueReader,
    reports: Connection,
    parent_pid: int,
) -> None:
    """What a process started by MultiprocExecutor does. It ends at rank 0's request or when rank 0 has died."""
    threading.Thread(target=_exit_with_parent, args=(parent_pid, store_path), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # tqdm's own is a named semaphore, which a killed process would leave behind
    try:
        reports.send(READY)
        worker_busy_loop(spec, placement, join_local_group(placement, store_path), queue.dequeue)
    except BaseException as error:
        with suppress(OSError):
            reports.send(RankFailure.of(error))
        sys.stdout.flush()
        sys.stderr.flush()
        # Rank 0 kills this process when it has read the report; _exit_with_parent ends it when rank 0 has died.
        time.sleep(EXIT_DELAY_S)
        os._exit(1)


def join_local_group(
    placement: RankPlacement, store_path: str, check: Callable[[], None] = lambda: None
) -> TensorParallel:
    """This rank's end of the group of all ranks on this machine. check: as in rendezvous."""
    placement.set_current_device()
    if placement.has_own_gpu:
        with gpu_lock:
            placement.initialize_device()
    store = FileStore(store_path, placement.size)
    return init_process_group(placement, store, lambda placement, store: rendezvous(placement, store, check))


def worker_busy_loop(
    spec: WorkerSpec, placement: RankPlacement, tp: TensorParallel, receive: Callable[[], StepMessage | None]
) -> None:
    """Compute each step that `receive` returns, until it returns None."""
    runner = spec.make_runner(placement, tp)
    # The sequences unpickled in each step make Python's collector examine all objects every hundred steps or so. With
    # those of the imported modules that takes 0.1 s, for which all ranks wait.
    gc.freeze()
    try:
        while (message := receive()) is not None:
            runner.run(message.batch, message.previous_sequences)
    finally:
        gc.unfreeze()
    runner.close()
    destroy_process_group(tp)


def _exit_with_parent(parent_pid: int, store_path: str) -> None:
    """End this process, even in a blocking call, when its parent has died; remove the files as rank 0 would."""
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    shutil.rmtree(os.path.dirname(store_path), ignore_errors=True)
    os._exit(1)
