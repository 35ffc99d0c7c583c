"""Ranks that fail where a test says. A fault is planted in the process of one rank, before it begins to work."""

import functools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.worker import local_ranks, model_runner, rank_process

PLACES = ("joining", "load", "sizing", "prefill", "decode")  # in the order in which a rank comes to them
MEMORY = 2**30  # holds fewer blocks of the bundled model than its 512 sequences could use
WORDS = "planted on purpose"


@dataclass(frozen=True)
class Fault:
    """Rank `rank` does `what` when it comes to `place`: raise, kill, exit, run out of memory, stop."""

    rank: int
    place: str
    what: str

    def strike(self) -> None:
        if self.what == "raise":
            raise ArithmeticError(WORDS)
        if self.what == "out of memory":
            raise torch.OutOfMemoryError(WORDS)
        if self.what == "value":
            raise ValueError(WORDS)
        if self.what == "exit":
            os._exit(3)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.what])


def plant(monkeypatch: Any, fault: Fault) -> None:
    """From now on, engines of this process start ranks with the fault."""
    monkeypatch.setattr(local_ranks, "run_rank", functools.partial(run_rank_with, fault))


def run_rank_with(fault: Fault, model: Any, place: Any, *rest: Any) -> None:
    """What the process of a rank runs."""
    if place.rank == fault.rank:
        _plant_here(fault)
    rank_process.run_rank(model, place, *rest)


def plant_memory(monkeypatch: Any, available: list[int]) -> None:
    """From now on, rank r of engines of this process finds available[r] bytes of memory."""
    monkeypatch.setattr(local_ranks, "run_rank", functools.partial(_run_rank_with_memory, available))
    monkeypatch.setattr(model_runner.psutil, "virtual_memory", lambda: SimpleNamespace(available=available[0]))


def _run_rank_with_memory(available: list[int], model: Any, place: Any, *rest: Any) -> None:
    model_runner.psutil.virtual_memory = lambda: SimpleNamespace(available=available[place.rank])
    rank_process.run_rank(model, place, *rest)


def _plant_here(fault: Fault) -> None:
    Runner = model_runner.ModelRunner
    if fault.place == "joining":
        rank_process.join = _first(fault.strike, rank_process.join)
    elif fault.place == "load":
        model_runner.load_model = _first(fault.strike, model_runner.load_model)
    elif fault.place == "sizing":
        Runner.allocate_kv_cache = _first(fault.strike, Runner.allocate_kv_cache)  # type: ignore[method-assign]
    else:
        run = Runner.run

        def faulty_run(self: Any, batch: Any) -> Any:
            if batch.is_prefill == (fault.place == "prefill"):
                fault.strike()
            return run(self, batch)

        Runner.run = faulty_run  # type: ignore[method-assign]


def _first(strike: Callable[[], None], work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)
    def struck(*args: Any, **kwargs: Any) -> Any:
        strike()
        return work(*args, **kwargs)

    return struck
