"""Ranks that fail where a test says. A fault is planted in the process of one rank, before it begins to work."""

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.worker import local_ranks, meeting, model_runner, rank_process

PLACES = ("joining", "load", "sizing", "prefill", "decode")  # in the order in which a rank comes to them
CONNECTING = "connecting"  # after "joining": the others know this rank's address, and it does not connect
WARM_UP = "warm-up"  # after "load", on GPUs only
MEMORY = 2**30  # holds fewer blocks of the bundled model than its 512 sequences could use
WORDS = "planted on purpose"


@dataclass(frozen=True)
class Fault:
    """Rank `rank` does `what` when it comes to `place`: raise, kill, exit, run out of memory, stop.

    log: a file in which the rank writes when it did so.
    """

    rank: int
    place: str
    what: str
    log: Path | None = None

    def trigger(self) -> None:
        if self.log is not None:
            self.log.write_text(repr(time.monotonic()))
        errors = {"raise": ArithmeticError, "value": ValueError, "host memory": MemoryError}
        errors["device memory"] = torch.OutOfMemoryError
        if self.what in errors:
            raise errors[self.what](WORDS)
        if self.what == "exit":
            os._exit(3)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.what])

    def seconds_since(self) -> float:
        """Between the rank's last entry in the log and now; one clock for all processes of a machine."""
        assert self.log is not None
        return time.monotonic() - float(self.log.read_text())


def plant(monkeypatch: Any, fault: Fault) -> None:
    """From now on, engines of this process have the fault."""
    if fault.rank == 0:
        plant_here(fault, monkeypatch.setattr)
    else:
        monkeypatch.setattr(local_ranks, "run_rank", functools.partial(run_rank_with, fault))


def run_rank_with(fault: Fault, model: Any, place: Any, *rest: Any) -> None:
    """What the process of a rank runs."""
    if place.rank == fault.rank:
        plant_here(fault)
    rank_process.run_rank(model, place, *rest)


def plant_memory(monkeypatch: Any, available: list[int]) -> None:
    """From now on, rank r of engines of this process finds available[r] bytes of memory."""
    monkeypatch.setattr(local_ranks, "run_rank", functools.partial(_run_rank_with_memory, available))
    monkeypatch.setattr(model_runner.psutil, "virtual_memory", lambda: _memory(available[0]))


def _memory(available: int) -> SimpleNamespace:
    return SimpleNamespace(available=available, total=available)


def _run_rank_with_memory(available: list[int], model: Any, place: Any, *rest: Any) -> None:
    model_runner.psutil.virtual_memory = lambda: _memory(available[place.rank])
    rank_process.run_rank(model, place, *rest)


def plant_here(fault: Fault, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Plant the fault in this process, whichever rank it is."""
    Runner = model_runner.ModelRunner
    functions: dict[str, tuple[Any, str]] = {
        "joining": (rank_process, "join"),
        "load": (model_runner, "load_model"),
        WARM_UP: (Runner, "warmup_model"),
        "sizing": (Runner, "allocate_kv_cache"),
    }
    if fault.place in functions:
        where, name = functions[fault.place]
        patch(where, name, _first(fault.trigger, getattr(where, name)))
    elif fault.place == CONNECTING:
        connect = meeting._connect_gloo
        patch(meeting, "_connect_gloo", lambda place, store: connect(place, TriggeringStore(store, fault)))
    else:
        run = Runner.run

        def faulty_run(self: Any, batch: Any) -> Any:
            if batch.is_prefill == (fault.place == "prefill"):
                fault.trigger()
            return run(self, batch)

        patch(Runner, "run", faulty_run)


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


def _first(trigger: Callable[[], None], work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)
    def with_fault(*args: Any, **kwargs: Any) -> Any:
        trigger()
        return work(*args, **kwargs)

    return with_fault
