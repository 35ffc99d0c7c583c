"""The life of rank 1, 2, ...: join the others, load a share of the model, compute what rank 0 sends until the end."""

import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovllm.config import Config
from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.model_config import ModelConfig
from nanovllm.worker.meeting import meet
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.process_group import FileStore, Place, join, leave
from nanovllm.worker.shm_channel import ShmReceiver

READY = "ready"  # said once torch is imported and the message channel is open
MAX_TRACEBACK_CHARS = 20_000
PARENT_POLL_SECONDS = 0.5
LINGER_SECONDS = 5.0  # of a rank that has failed, for rank 0 to end it


@dataclass(frozen=True)
class Model:
    """What every rank loads a share of."""

    config: Config
    model_config: ModelConfig
    model_dir: Path


@dataclass(frozen=True)
class RankReport:
    """What a rank that failed says last. time: of time.monotonic(), one clock for all processes of a machine."""

    cause: str
    traceback: str
    is_value_error: bool
    time: float

    @staticmethod
    def of(error: BaseException) -> "RankReport":
        text = "".join(traceback.format_exception(error))[-MAX_TRACEBACK_CHARS:]
        cause = f"{type(error).__name__}: {error}"
        return RankReport(cause, text, isinstance(error, ValueError), time.monotonic())


def run_rank(
    model: Model, place: Place, store_path: str, receiver: ShmReceiver, reports: Connection, parent_pid: int
) -> None:
    """All that a process started by rank 0 does. It ends when rank 0 says so, or has gone."""
    threading.Thread(target=_end_with, args=(parent_pid, store_path), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a system-wide semaphore, which nobody removes when a rank is killed
    try:
        reports.send(READY)
        tp = join(place, FileStore(store_path, place.size), meet)
        serve(model, place, tp, receiver.receive)
    except BaseException as error:
        with suppress(OSError):
            reports.send(RankReport.of(error))
        sys.stdout.flush()
        sys.stderr.flush()
        # Rank 0 has read it, and kills this process; or it has gone, and _end_with clears up. Only time shows which: a
        # pipe takes a report that nobody reads as long as anybody has its other end.
        time.sleep(LINGER_SECONDS)
        os._exit(1)


def serve(model: Model, place: Place, tp: TensorParallel, receive: Callable[[], Any]) -> None:
    """Compute each batch that `receive` returns, until it returns None."""
    runner = ModelRunner(model.config, model.model_config, model.model_dir, tp, place.num_sharing)
    while (batch := receive()) is not None:
        runner.run(batch)
    runner.close()
    leave(tp)


def _end_with(parent_pid: int, store_path: str) -> None:
    """End this process when its parent has gone, whatever it waits for then: rank 0 may have been killed."""
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_SECONDS)
    shutil.rmtree(os.path.dirname(store_path), ignore_errors=True)  # as rank 0 would
    os._exit(1)
