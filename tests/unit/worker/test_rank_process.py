"""The life of a rank that rank 0 started, with stand-ins for what it calls: run_rank in the test's process."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import Config
from nanovllm.worker import rank_process
from nanovllm.worker.process_group import Place
from nanovllm.worker.rank_process import LINGER_SECONDS, READY, Model, run_rank

PARENT = 4321
MODEL: Any = Model(Config("any", tensor_parallel_size=2), None, None)  # type: ignore[arg-type]


class Exit(BaseException):
    """In place of the end of this process."""


class Life:
    """Writes down what a rank does. It fails with `error` when it joins; what it sends is lost once `is_alone`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
        self.events: list[Any] = []
        self.reports: list[Any] = []
        self.error, self.is_alone = error, False
        monkeypatch.setattr(rank_process, "_end_with", lambda *_: None)
        monkeypatch.setattr(rank_process.tqdm, "set_lock", lambda lock: None)
        monkeypatch.setattr(rank_process, "FileStore", lambda *_: None)
        monkeypatch.setattr(rank_process, "join", self.join)
        monkeypatch.setattr(rank_process, "serve", lambda *_: self.events.append("serve"))
        monkeypatch.setattr(rank_process.time, "sleep", lambda seconds: self.events.append(seconds))
        monkeypatch.setattr(rank_process.os, "_exit", self.exit)

    def live(self) -> None:
        run_rank(MODEL, Place(1, 2, num_sharing=2), "store", self, self, PARENT)  # type: ignore[arg-type]

    def send(self, report: Any) -> None:
        if self.is_alone:
            raise BrokenPipeError
        self.events.append(report if report == READY else "report")
        self.reports.append(report)

    def receive(self) -> None:
        """The receiver's, which is not asked here."""

    def join(self, *_: object) -> None:
        self.events.append("join")
        if self.error is not None:
            self.is_alone = isinstance(self.error, ConnectionError)
            raise self.error

    def exit(self, code: int) -> None:
        self.events.append(f"exit {code}")
        raise Exit


def test_a_rank_is_ready_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 joins when all are ready: a rank that dies before, when it imports the user's program, costs no wait."""
    life = Life(monkeypatch)
    life.live()
    assert life.events == [READY, "join", "serve"]


@pytest.mark.parametrize("error", [ArithmeticError("oh"), SystemExit("oh")])
def test_a_rank_that_fails_says_why_and_what_it_printed_and_waits(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """D33: then rank 0 kills it, or its thread ends it when rank 0 has gone."""
    life = Life(monkeypatch, error)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "flush", lambda name=name: life.events.append(f"flush {name}"))
    with pytest.raises(Exit):
        life.live()
    assert life.events == [READY, "join", "report", "flush stdout", "flush stderr", LINGER_SECONDS, "exit 1"]
    assert life.reports[1].cause == f"{type(error).__name__}: oh"


def test_a_rank_that_fails_since_rank_0_has_gone_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """D34: its thread clears up in the meantime."""
    life = Life(monkeypatch, ConnectionError("closed by peer"))
    with pytest.raises(Exit):
        life.live()
    assert life.events == [READY, "join", LINGER_SECONDS, "exit 1"]


def test_an_orphan_ends_whoever_takes_it_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """D33 D34: a service manager or a shell may, not only process 1. It clears up as rank 0 would."""
    directory = tmp_path / "nanovllm-x"
    directory.mkdir()
    parents: Iterator[int] = iter([PARENT, PARENT, 77, 77])
    looks = iter(range(3))

    def end(code: int) -> None:
        raise Exit

    monkeypatch.setattr(rank_process.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(rank_process.time, "sleep", lambda seconds: next(looks))
    monkeypatch.setattr(rank_process.os, "_exit", end)
    with pytest.raises(Exit):
        rank_process._end_with(PARENT, str(directory / "store"))
    assert not directory.exists()
    assert next(looks) == 2, "it looked while rank 0 was there"


def test_a_rank_knows_who_shares_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """D30: so that its cache leaves room for theirs."""
    told: list[object] = []

    class Runner:
        def __init__(self, *arguments: object) -> None:
            told.extend(arguments)

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setattr(rank_process, "ModelRunner", Runner)
    monkeypatch.setattr(rank_process, "leave", lambda tp: None)
    tp: Any = "the group"
    rank_process.serve(MODEL, Place(1, 2, num_sharing=2), tp, lambda: None)
    assert told == [MODEL.config, None, None, "the group", 2, "closed"]
