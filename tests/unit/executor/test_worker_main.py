"""What a rank that rank 0 started does, with stand-ins for what it calls: worker_main in the test's process."""

import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.distributed.placement import RankPlacement
from nanovllm.executor import worker_main
from nanovllm.executor.failure_monitor import READY
from nanovllm.executor.worker_main import EXIT_DELAY_S, StepMessage, WorkerSpec, worker_busy_loop

PARENT = 4321
PLACEMENT = RankPlacement(1, 2, num_ranks_per_device=2)
SPEC: Any = WorkerSpec("config", "model config", "directory")  # type: ignore[arg-type]


class Exit(BaseException):
    """In place of the end of this process."""


def run(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None, has_rank_0: bool = True) -> list[Any]:
    """The events of worker_main, which fails with `error` when it joins the group."""
    events: list[Any] = []

    def join(*_: object) -> None:
        events.append("join")
        if error is not None:
            raise error

    def send(report: Any) -> None:
        if not has_rank_0 and report != READY:
            raise BrokenPipeError
        events.append(report if report == READY else report.cause)

    def exit_process(code: int) -> None:
        events.append(f"exit {code}")
        raise Exit

    monkeypatch.setattr(worker_main, "_exit_with_parent", lambda *_: None)
    monkeypatch.setattr(worker_main.tqdm, "set_lock", lambda lock: None)
    monkeypatch.setattr(worker_main, "join_local_group", join)
    monkeypatch.setattr(worker_main, "worker_busy_loop", lambda *_: events.append("compute"))
    monkeypatch.setattr(worker_main.time, "sleep", events.append)
    monkeypatch.setattr(worker_main.os, "_exit", exit_process)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "flush", lambda name=name: events.append(f"flush {name}"))
    queue: Any = SimpleNamespace(dequeue=None)
    reports: Any = SimpleNamespace(send=send)
    with suppress(Exit):
        worker_main.worker_main(SPEC, PLACEMENT, "store", queue, reports, PARENT)
    return events


@pytest.mark.parametrize("error", [ArithmeticError("oh"), SystemExit("oh")])
@pytest.mark.parametrize("has_rank_0", [True, False])
def test_a_rank_that_fails_reports_the_cause_and_waits_for_its_end(monkeypatch, error, has_rank_0) -> None:
    """D33 D34: rank 0 kills it, or its thread ends it, and removes the files, when rank 0 has died."""
    assert run(monkeypatch) == [READY, "join", "compute"], "without an error"
    report = [f"{type(error).__name__}: oh"] if has_rank_0 else []
    expected = [READY, "join", *report, "flush stdout", "flush stderr", EXIT_DELAY_S, "exit 1"]
    assert run(monkeypatch, error, has_rank_0) == expected


def test_an_orphan_exits_whatever_process_becomes_its_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """D33 D34: a service manager or a shell may, not only process 1. It removes the files as rank 0 would."""
    directory = tmp_path / "nanovllm-x"
    directory.mkdir()
    parents, sleeps = iter([PARENT, PARENT, 77, 77]), iter(range(3))

    def exit_process(code: int) -> None:
        raise Exit

    monkeypatch.setattr(worker_main.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(worker_main.time, "sleep", lambda seconds: next(sleeps))
    monkeypatch.setattr(worker_main.os, "_exit", exit_process)
    with pytest.raises(Exit):
        worker_main._exit_with_parent(PARENT, str(directory / "store"))
    assert not directory.exists()
    assert next(sleeps) == 2, "it waited while rank 0 was there"


@pytest.fixture
def frozen_again() -> Iterator[None]:
    """worker_busy_loop unfreezes what tests/conftest.py froze; collections would take a third of a second."""
    yield
    gc.freeze()


@pytest.mark.usefixtures("frozen_again")
def test_a_rank_computes_what_is_sent_and_frees_its_runner_before_it_destroys_the_group(monkeypatch) -> None:
    """D35: the runner's graphs recorded collectives of the group. D30: it knows how many ranks share its memory."""
    calls: list[Any] = []

    class Runner:
        def __init__(self, *arguments: Any) -> None:
            calls.append(arguments)

        def run(self, *step: Any) -> None:
            calls.append(step)

        def close(self) -> None:
            calls.append("free")

    monkeypatch.setattr(worker_main, "ModelRunner", Runner)
    monkeypatch.setattr(worker_main, "destroy_process_group", lambda tp: calls.append(f"destroy {tp}"))
    first, second = StepMessage("a"), StepMessage("b", ("a's sequence",))  # type: ignore[arg-type]
    worker_busy_loop(SPEC, PLACEMENT, "group", iter([first, second, None]).__next__)  # type: ignore[arg-type]
    arguments = ("config", "model config", "directory", "group", 2, None)
    assert calls == [arguments, ("a", None), ("b", ("a's sequence",)), "free", "destroy group"]


@pytest.mark.usefixtures("frozen_again")
def test_the_garbage_collector_does_not_examine_what_was_there_before_the_first_step(monkeypatch) -> None:
    """With 200,000 objects of imported modules, each full collection stopped all ranks for 0.1 s."""
    num_frozen: list[int] = []
    runner = SimpleNamespace(run=lambda *step: num_frozen.append(gc.get_freeze_count()), close=lambda: None)
    monkeypatch.setattr(worker_main, "ModelRunner", lambda *arguments: runner)
    monkeypatch.setattr(worker_main, "destroy_process_group", lambda tp: None)
    num_objects = len(gc.get_objects())
    worker_busy_loop(SPEC, PLACEMENT, "group", iter([StepMessage("a"), None]).__next__)  # type: ignore[arg-type]
    assert num_frozen[0] >= num_objects
    assert gc.get_freeze_count() == 0, "what the ranks no longer need could not be collected"
