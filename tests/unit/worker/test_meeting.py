"""Ranks that meet, each in a thread: one is slow, one cannot connect, one never comes."""

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nanovllm.worker import meeting
from nanovllm.worker.local_ranks import PATIENCE_SECONDS
from nanovllm.worker.meeting import meet
from nanovllm.worker.process_group import FileStore, Place, PrefixStore
from tests.support.counts import count_event, record_error
from tests.support.limits import HANG_SECONDS
from tests.support.rank_faults import CONNECTING, WORDS, Fault, TriggeringStore

SLOW_SECONDS = 1.5  # longer than a FileStore waits at least, which is one second


@pytest.fixture(autouse=True)
def _nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective that not all ranks come to ends."""
    monkeypatch.setattr(meeting, "FOR_EVER", timedelta(seconds=HANG_SECONDS))


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


def open_store(path: str, size: int) -> Any:
    """Whoever waits in it for a word that nobody says waits not for ever, where no `check` would be called."""
    store = FileStore(path, size)
    store.set_timeout(timedelta(seconds=HANG_SECONDS))
    return store


def meet_in_threads(
    store_path: str, size: int, come: Callable[[int], None] = lambda rank: None, places: list[Place] | None = None
) -> list[Any]:
    """What each rank's meet() returned or raised; each comes when come(rank) has returned. places: the CPU if None."""
    places = places or [Place(rank, size, num_sharing=size) for rank in range(size)]
    end = time.monotonic() + HANG_SECONDS

    def check() -> None:
        if time.monotonic() > end:
            raise RuntimeError("waits for ever")

    def one(rank: int) -> Any:
        come(rank)
        try:
            return meet(places[rank], open_store(store_path, size), check)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))


def sums(groups: list[Any], slow: int | None = None) -> list[float]:
    """What an all-reduce of the ranks' numbers, from 1 on, gives each of them; rank `slow` comes to it late."""
    assert not [group for group in groups if isinstance(group, Exception)]

    def one(rank: int) -> float:
        if rank == slow:
            time.sleep(SLOW_SECONDS)
        x = torch.tensor([rank + 1.0])
        groups[rank].allreduce([x]).wait()
        return float(x)

    with ThreadPoolExecutor(len(groups)) as threads:
        return list(threads.map(one, range(len(groups))))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_meet(store_path: str, size: int) -> None:
    groups = meet_in_threads(store_path, size)
    assert sums(groups) == [size * (size + 1) / 2] * size


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
    count_event("ranks that tried again to connect")


class Connected:
    """A group that nothing is asked of."""

    def _set_default_timeout(self, timeout: object) -> None:
        pass


def test_a_rank_that_comes_late_costs_no_attempt(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: nobody begins to connect before all have come, or its time would run out."""
    events: list[str] = []
    monkeypatch.setattr(meeting, "_connect_gloo", lambda place, store: events.append("connect") or (Connected(), None))

    def come(rank: int) -> None:
        time.sleep(0.2 * rank)
        events.append("come")

    groups = meet_in_threads(store_path, 3, come)
    assert events == ["come"] * 3 + ["connect"] * 3
    assert all(isinstance(group, Connected) for group in groups)


def test_an_attempt_begins_when_all_have_come_to_it(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: it has its own words. What the ranks said of the one before, in which one of them failed, has been said."""
    monkeypatch.setattr(meeting, "_hear_all", slow_to_come(meeting._hear_all))
    tried = [0, 0, 0]

    def connect(place: Place, store: Any) -> tuple[Any, RuntimeError | None]:
        tried[place.rank] += 1
        is_lost = place.rank == 1 and tried[1] == 1
        return (None, RuntimeError("too slow")) if is_lost else (Connected(), None)

    monkeypatch.setattr(meeting, "_connect_gloo", connect)
    groups = meet_in_threads(store_path, 3)
    assert all(isinstance(group, Connected) for group in groups)
    assert tried == [2, 2, 2]


def slow_to_come(hear_all: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Rank 1 says everything a little later than the others."""

    def heard(store: Any, place: Place, *rest: Any) -> list[str]:
        time.sleep(0.1 * (place.rank == 1))
        return hear_all(store, place, *rest)

    return heard


def test_ranks_that_have_met_wait_for_a_slow_one(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: the time of an attempt is not that of a collective, in which one rank may compute for longer."""
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 1.0)  # gloo's own limit is a fifth of it
    groups = meet_in_threads(store_path, 2)
    assert sums(groups, slow=1) == [3.0] * 2


def test_ranks_listen_to_their_own_machine_only(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody on the network can send them anything. They find each other whatever the machine's name is, and whatever
    is said of its interfaces for programs that run on several machines.
    """
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")

    def listening() -> set[Any]:
        return {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}

    before = listening()
    groups = meet_in_threads(store_path, 2)
    new = listening() - before
    assert new, "gloo listens as long as there is a group"
    assert {address.ip for address in new} == {"127.0.0.1"}
    assert sums(groups) == [3.0] * 2


def test_ranks_on_one_gpu_meet_over_gloo(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D36: NCCL refuses two ranks on one GPU."""
    monkeypatch.setattr(meeting, "nccl", lambda place, store: pytest.fail("NCCL on a shared GPU"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(meeting, "_connect_gloo", lambda place, store: (Connected(), None))
    places = [Place(rank, 2, num_sharing=2, gpu=0) for rank in range(2)]
    groups = meet_in_threads(store_path, 2, places=places)
    assert all(isinstance(group, Connected) for group in groups)


def test_an_attempt_with_a_rank_that_died_is_over_while_it_is_waited_for(store_path: str) -> None:
    """D33: rank 1 said where it is, and rank 0 listens for it. LocalRanks.connect waits PATIENCE_SECONDS for the end of
    an attempt, in which check is not called.
    """
    store = open_store(store_path, 2)
    for number in range(50):  # which of two listens depends on their ports, so half of these are refused at once
        seconds, error = connect_to_a_dead_rank(PrefixStore(str(number), store))
        if "refused" not in error:
            break
    assert "Connect timeout" in error
    record_error("seconds of an attempt to connect to a rank that died", seconds, PATIENCE_SECONDS)
    assert seconds < PATIENCE_SECONDS


def connect_to_a_dead_rank(store: Any) -> tuple[float, str]:
    """The seconds that rank 0 took to fail, and its error."""
    with pytest.raises(ArithmeticError, match=WORDS):
        meeting._connect_gloo(Place(1, 2, num_sharing=2), TriggeringStore(store, Fault(1, CONNECTING, "raise")))
    begin = time.monotonic()
    group, error = meeting._connect_gloo(Place(0, 2, num_sharing=2), store)
    assert group is None
    return time.monotonic() - begin, str(error)


def test_a_rank_that_cannot_connect_says_why(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After MAX_ATTEMPTS, and the others say that they were not the cause."""
    monkeypatch.setattr(meeting, "MAX_ATTEMPTS", 3)
    tried: list[int] = []

    def connect(place: Place, store: Any) -> tuple[Any, RuntimeError | None]:
        tried.append(place.rank)
        assert len(tried) <= 9, "never gives up"
        return (None, RuntimeError("too many open files")) if place.rank == 1 else (Connected(), None)

    monkeypatch.setattr(meeting, "_connect_gloo", connect)
    texts = [str(error) for error in meet_in_threads(store_path, 3)]
    assert texts == ["1 of 3 ranks failed to connect over gloo", "too many open files", texts[0]]
    assert sorted(tried) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_nccl_begins_when_all_have_come(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: it cannot be called off while it waits for a rank, which may have died on its way here."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("context"))
    monkeypatch.setattr(meeting, "nccl", lambda place, store: events.append("nccl") or f"nccl of rank {place.rank}")
    places = [Place(rank, 3, num_sharing=1, gpu=rank) for rank in range(3)]
    groups = meet_in_threads(store_path, 3, lambda rank: time.sleep(0.2 * rank), places)
    assert groups == [f"nccl of rank {rank}" for rank in range(3)]
    assert events == ["context"] * 3 + ["nccl"] * 3


@pytest.mark.parametrize("gpu", [None, 0])
def test_check_ends_the_waiting_for_a_rank_that_never_comes(
    store_path: str, monkeypatch: pytest.MonkeyPatch, gpu: int | None
) -> None:
    """D33: over gloo, and over NCCL."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    num_sharing = 2 if gpu is None else 1
    num_checks, sleeps = 0, iter(range(20))

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 5:
            raise InterruptedError("over")

    def connect(*_: object) -> None:
        pytest.fail("connects without a rank")

    monkeypatch.setattr(meeting, "_connect_gloo", connect)
    monkeypatch.setattr(meeting, "nccl", connect)
    # Ends a test that waits without a look.
    monkeypatch.setattr(meeting, "time", SimpleNamespace(sleep=lambda seconds: next(sleeps)))
    with pytest.raises(InterruptedError, match=r"^over$"):
        meet(Place(0, 2, num_sharing, gpu), open_store(store_path, 2), check)
    assert num_checks == 5
