"""Ranks that meet, each in a thread: one is slow, one cannot connect, one never comes."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.worker import meeting
from nanovllm.worker.meeting import meet
from nanovllm.worker.process_group import FileStore, Place
from tests.evidence import happened

pytestmark = pytest.mark.timeout(15)  # ranks that do not meet wait for ever

SLOW_SECONDS = 1.5  # longer than a FileStore waits at least, which is one second


@pytest.fixture
def store_path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        yield str(Path(directory) / "store")


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ranks in the order in which they tried to connect."""
    ranks: list[int] = []
    connect = meeting._connect_gloo

    def counted(place: Place, store: Any) -> tuple[Any, RuntimeError | None]:
        ranks.append(place.rank)
        return connect(place, store)

    monkeypatch.setattr(meeting, "_connect_gloo", counted)
    return ranks


def meet_in_threads(store_path: str, size: int) -> list[Any]:
    """What each rank's meet() returned or raised."""

    def one(rank: int) -> Any:
        try:
            return meet(Place(rank, size, num_sharing=size), FileStore(store_path, size))
        except RuntimeError as error:
            return error

    return together(one, size)


def together(work: Callable[[int], Any], size: int) -> list[Any]:
    """work(rank) of each rank, in a thread of its own, which does not outlive the tests if it never ends."""
    results: list[Future[Any]] = [Future() for _ in range(size)]

    def run(rank: int) -> None:
        try:
            results[rank].set_result(work(rank))
        except BaseException as error:
            results[rank].set_exception(error)

    for rank in range(size):
        threading.Thread(target=run, args=(rank,), daemon=True).start()
    return [result.result() for result in results]


def sums(groups: list[Any]) -> list[float]:
    """What an all-reduce of the ranks' numbers, from 1 on, gives each of them."""

    def one(rank: int) -> float:
        x = torch.tensor([rank + 1.0])
        groups[rank].allreduce([x]).wait()
        return float(x)

    return together(one, len(groups))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_meet(store_path: str, size: int) -> None:
    groups = meet_in_threads(store_path, size)
    assert sums(groups) == [size * (size + 1) / 2] * size


def test_a_rank_that_comes_late_costs_no_attempt(
    store_path: str, monkeypatch: pytest.MonkeyPatch, attempts: list[int]
) -> None:
    """The time of an attempt begins when all have come, however long that takes."""
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 0.1)

    def come(rank: int) -> Any:
        time.sleep(SLOW_SECONDS * rank)
        return meet(Place(rank, 2, num_sharing=2), FileStore(store_path, 2))

    assert sums(together(come, 2)) == [3.0] * 2
    assert sorted(attempts) == [0, 1]


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_when_a_rank_is_slow_all_try_again(
    store_path: str, monkeypatch: pytest.MonkeyPatch, attempts: list[int], slow: int
) -> None:
    """D33: it is waited for, for longer than an attempt lasts. The two others may have connected to each other."""
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 0.1)
    connect = meeting._connect_gloo
    is_first = True

    def slowly(place: Place, store: Any) -> tuple[Any, RuntimeError | None]:
        nonlocal is_first
        if place.rank == slow and is_first:
            is_first = False
            time.sleep(SLOW_SECONDS)
        return connect(place, store)

    monkeypatch.setattr(meeting, "_connect_gloo", slowly)
    groups = meet_in_threads(store_path, 3)
    assert sums(groups) == [6.0] * 3
    assert attempts.count(0) == attempts.count(1) == attempts.count(2) >= 2
    happened("ranks that tried again to connect")


def test_a_rank_that_cannot_connect_says_why(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After MAX_ATTEMPTS, and the others say that they were not the cause."""
    monkeypatch.setattr(meeting, "MAX_ATTEMPTS", 3)
    tried: list[int] = []

    def connect(place: Place, store: Any) -> tuple[Any, RuntimeError | None]:
        tried.append(place.rank)
        return (None, RuntimeError("too many open files")) if place.rank == 1 else ("connected", None)

    monkeypatch.setattr(meeting, "_connect_gloo", connect)
    texts = [str(error) for error in meet_in_threads(store_path, 3)]
    assert texts == ["1 of 3 ranks failed to connect over gloo", "too many open files", texts[0]]
    assert sorted(tried) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_nccl_begins_when_all_have_come(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: it cannot be called off while it waits for a rank, which may have died on its way here."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("context"))
    monkeypatch.setattr(meeting, "nccl", lambda place, store: events.append("nccl") or f"nccl of rank {place.rank}")

    def one(rank: int) -> Any:
        time.sleep(0.2 * rank)
        return meet(Place(rank, 3, num_sharing=1, gpu=rank), FileStore(store_path, 3))

    assert together(one, 3) == [f"nccl of rank {rank}" for rank in range(3)]
    assert events == ["context"] * 3 + ["nccl"] * 3


def test_what_was_said_in_one_attempt_is_not_heard_in_the_next(
    store_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 fails once; the other waits for what it says of the second attempt."""
    tried: list[int] = []

    def connect(place: Place, store: Any) -> tuple[Any, RuntimeError | None]:
        tried.append(place.rank)
        if place.rank == 0:
            return Group(), None
        if tried.count(1) == 2:
            time.sleep(0.5)
            return Group(), None
        return None, RuntimeError("once")

    class Group:
        def _set_default_timeout(self, _: object) -> None: ...

    monkeypatch.setattr(meeting, "_connect_gloo", connect)
    assert all(isinstance(group, Group) for group in meet_in_threads(store_path, 2))
    assert sorted(tried) == [0, 0, 1, 1]


@pytest.mark.parametrize("gpu", [None, 0])
def test_check_ends_the_waiting_for_a_rank_that_never_comes(
    store_path: str, monkeypatch: pytest.MonkeyPatch, gpu: int | None
) -> None:
    """D33: over gloo, and over NCCL."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    num_sharing = 2 if gpu is None else 1
    num_checks = 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 5:
            raise InterruptedError("over")

    with pytest.raises(InterruptedError, match=r"^over$"):
        meet(Place(0, 2, num_sharing, gpu), FileStore(store_path, 2), check)
    assert num_checks == 5
