"""Ranks that fail where a test says: a fault is planted in the process of one rank."""

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.distributed import rendezvous
from nanovllm.executor import multiproc, worker_main
from nanovllm.worker import model_runner

PLACES = ("joining", "load", "sizing", "prefill", "decode")  # in the order in which a rank reaches them
CONNECTING = "connecting"  # after "joining": the others know this rank's address, and it does not connect
CONNECTED = "connected"  # after that: the rank has connected, and does not publish it
WARM_UP = "warm-up"  # after "load", on GPUs only
WORDS = "planted on purpose"
ERRORS: dict[str, type[Exception]] = {
    "raise": ArithmeticError,
    "value": ValueError,
    "host memory": MemoryError,
    "device memory": torch.OutOfMemoryError,
}


@dataclass(frozen=True)
class Fault:
    """Rank `rank` does `what` when it reaches `place`: kill, exit, stop, or raise that of ERRORS.

    log: a file to which the rank writes the time of the fault.
    """

    rank: int
    place: str
    what: str
    log: Path | None = None

    def trigger(self) -> None:
        if self.log is not None:
            self.log.write_text(repr(time.monotonic()))
        if self.what in ERRORS:
            raise ERRORS[self.what](WORDS)
        if self.what == "exit":
            os._exit(3)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.what])

    def seconds_since(self) -> float:
        """Seconds since the fault was triggered last, by one clock for all processes of a machine."""
        assert self.log is not None
        return time.monotonic() - float(self.log.read_text())


def plant(monkeypatch: Any, fault: Fault) -> None:
    """From now on, engines of this process have the fault."""
    if fault.rank == 0:
        plant_here(fault, monkeypatch.setattr)
    else:
        monkeypatch.setattr(multiproc, "worker_main", functools.partial(_faulty_worker, fault, multiproc.worker_main))


def _faulty_worker(fault: Fault, work: Callable[..., None], spec: Any, placement: Any, *rest: Any) -> None:
    if placement.rank == fault.rank:
        plant_here(fault)
    work(spec, placement, *rest)


def plant_here(fault: Fault, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Plant the fault in this process, whichever rank it is."""
    Runner = model_runner.ModelRunner
    where, name = {
        "joining": (worker_main, "join_local_group"),
        CONNECTING: (rendezvous, "_connect_gloo"),
        CONNECTED: (rendezvous, "_connect_gloo"),
        "load": (model_runner, "load_model"),
        WARM_UP: (Runner, "warmup_model"),
        "sizing": (Runner, "allocate_kv_cache"),
        "prefill": (Runner, "run"),
        "decode": (Runner, "run"),
    }[fault.place]
    work = getattr(where, name)

    @functools.wraps(work)
    def with_fault(*args: Any, **kwargs: Any) -> Any:
        if fault.place == CONNECTING:
            return work(args[0], TriggeringStore(args[1], fault))
        if fault.place == CONNECTED:
            work(*args)
        if name != "run" or args[1].is_prefill == (fault.place == "prefill"):
            fault.trigger()
        return work(*args, **kwargs)

    patch(where, name, with_fault)


class TriggeringStore(dist.Store):
    """Triggers the fault when gloo has told the others this rank's address."""

    def __init__(self, store: Any, fault: Fault) -> None:
        super().__init__()
        self._store, self._fault = store, fault

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)
        self._fault.trigger()

    def get(self, key: str) -> Any:
        return self._store.get(key)

    def wait(self, keys: list[str], *timeout: Any) -> None:  # type: ignore[override]
        self._store.wait(keys, *timeout)
