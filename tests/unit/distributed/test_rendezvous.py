"""Ranks that connect, each in a thread: one is slow, one cannot connect, one never comes."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nanovllm.distributed import rendezvous as module
from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.process_group import FileStore, PrefixStore
from nanovllm.distributed.rendezvous import rendezvous
from nanovllm.executor.multi_rank import ROOT_CAUSE_TIMEOUT_S
from tests.support.counts import count_event, record_error
from tests.support.limits import HANG_SECONDS
from tests.support.parallel_ranks import run_together
from tests.support.rank_faults import CONNECTING, WORDS, Fault, TriggeringStore

SLOW_SECONDS = 1.5  # longer than a FileStore waits at least, which is one second
WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


@pytest.fixture(autouse=True)
def _nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective that not all ranks call ends."""
    monkeypatch.setattr(module, "NO_TIMEOUT", timedelta(seconds=HANG_SECONDS))


@pytest.fixture
def store_path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        yield str(Path(directory) / "store")


def open_store(path: str, size: int) -> Any:
    store = FileStore(path, size)
    store.set_timeout(timedelta(seconds=HANG_SECONDS))  # where no `check` would be called
    return store


def on_cpus(size: int) -> list[RankPlacement]:
    return [RankPlacement(rank, size, num_ranks_per_device=size) for rank in range(size)]


def meet(
    store_path: str, placements: list[RankPlacement], come: Callable[[int], None] = lambda rank: None
) -> list[Any]:
    """What each rank's rendezvous() returned or raised. Each rank calls rendezvous() after come(rank) returns."""
    end = time.monotonic() + HANG_SECONDS

    def check() -> None:
        if time.monotonic() > end:
            raise RuntimeError(f"rendezvous() did not return within {HANG_SECONDS} s")

    def one(placement: RankPlacement) -> Any:
        come(placement.rank)
        try:
            return rendezvous(placement, open_store(store_path, placement.size), check)
        except RuntimeError as error:
            return error

    return run_together(one, placements)


def sums(groups: list[Any], slow: int | None = None) -> list[float]:
    """What an all-reduce of the ranks' numbers, from 1 on, gives each of them; rank `slow` calls it late."""
    assert not [group for group in groups if isinstance(group, Exception)]

    def one(rank: int) -> float:
        if rank == slow:
            time.sleep(SLOW_SECONDS)
        x = torch.tensor([rank + 1.0])
        groups[rank].allreduce([x]).wait()
        return float(x)

    return run_together(one, range(len(groups)))


class Connected:
    """A group of which the tests ask nothing."""

    def _set_default_timeout(self, timeout: object) -> None:
        pass


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces connecting over gloo by success, and records the ranks that tried, in order."""
    ranks: list[int] = []
    monkeypatch.setattr(module, "_connect_gloo", lambda one, store: ranks.append(one.rank) or (Connected(), None))
    return ranks


@pytest.mark.parametrize(("size", "slow"), [(2, 1), (8, None)])
def test_ranks_connect_and_wait_for_a_slow_one(store_path: str, monkeypatch, size: int, slow: int | None) -> None:
    """D33: the timeout of an attempt is not that of a collective, before which one rank may compute for longer."""
    if slow is not None:
        monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 1.0)  # gloo's own limit is a fifth of it
    assert sums(meet(store_path, on_cpus(size)), slow) == [size * (size + 1) / 2] * size


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_when_a_rank_is_slow_all_try_again(store_path: str, monkeypatch: pytest.MonkeyPatch, slow: int) -> None:
    """D33: it is waited for, for longer than an attempt lasts. The two others may have connected to each other."""
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.1)
    connect, attempts = module._connect_gloo, []

    def slowly(placement: RankPlacement, store: Any) -> tuple[Any, RuntimeError | None]:
        if placement.rank == slow and slow not in attempts:
            time.sleep(SLOW_SECONDS)
        attempts.append(placement.rank)
        return connect(placement, store)

    monkeypatch.setattr(module, "_connect_gloo", slowly)
    assert sums(meet(store_path, on_cpus(3))) == [6.0] * 3
    assert attempts.count(0) == attempts.count(1) == attempts.count(2) >= 2
    count_event("ranks that tried again to connect")


def test_an_attempt_begins_when_all_have_come_to_it(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: with statuses of its own, not those of the attempt before, in which rank 1 failed and is late."""
    exchange, tried = module._exchange_status, [0, 0, 0]

    def slow_exchange(store: Any, placement: RankPlacement, *rest: Any) -> list[str]:
        time.sleep(0.1 * (placement.rank == 1))
        return exchange(store, placement, *rest)

    def connect(placement: RankPlacement, store: Any) -> tuple[Any, RuntimeError | None]:
        tried[placement.rank] += 1
        is_lost = placement.rank == 1 and tried[1] == 1
        return (None, RuntimeError("too slow")) if is_lost else (Connected(), None)

    monkeypatch.setattr(module, "_exchange_status", slow_exchange)
    monkeypatch.setattr(module, "_connect_gloo", connect)
    assert all(isinstance(group, Connected) for group in meet(store_path, on_cpus(3)))
    assert tried == [2, 2, 2]


def test_ranks_listen_to_their_own_machine_only(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other machines cannot send them anything, and they find each other whatever the machine's name is, and whatever
    GLOO_SOCKET_IFNAME says for programs that run on several machines.
    """
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")

    def listening() -> set[Any]:
        return {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}

    before = listening()
    groups = meet(store_path, on_cpus(2))
    new = listening() - before
    assert {address.ip for address in new} == {"127.0.0.1"}, "gloo listens as long as there is a group"
    assert sums(groups) == [3.0] * 2


def test_an_attempt_with_a_rank_that_died_ends_while_it_is_waited_for(store_path: str) -> None:
    """D33: rank 1 published its address, and rank 0 listens for it. MultiprocExecutor waits ROOT_CAUSE_TIMEOUT_S for
    the end of an attempt, in which check is not called.
    """
    store = open_store(store_path, 2)
    for number in range(50):  # which of two listens depends on their ports, so half of these are refused at once
        seconds, error = connect_to_a_dead_rank(PrefixStore(str(number), store))
        if "refused" not in error:
            break
    assert "Connect timeout" in error
    record_error("seconds of an attempt to connect to a rank that died", seconds, ROOT_CAUSE_TIMEOUT_S)
    assert seconds < ROOT_CAUSE_TIMEOUT_S


def connect_to_a_dead_rank(store: Any) -> tuple[float, str]:
    """The seconds after which rank 0 failed, and its error."""
    rank_0, rank_1 = on_cpus(2)
    with pytest.raises(ArithmeticError, match=WORDS):
        module._connect_gloo(rank_1, TriggeringStore(store, Fault(1, CONNECTING, "raise")))
    begin = time.monotonic()
    group, error = module._connect_gloo(rank_0, store)
    assert group is None
    return time.monotonic() - begin, str(error)


def test_a_rank_that_cannot_connect_says_why(store_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After MAX_ATTEMPTS, and the others say that they were not the cause."""
    monkeypatch.setattr(module, "MAX_ATTEMPTS", 3)
    tried: list[int] = []

    def connect(placement: RankPlacement, store: Any) -> tuple[Any, RuntimeError | None]:
        tried.append(placement.rank)
        assert len(tried) <= 9, "never gives up"
        return (None, RuntimeError("too many open files")) if placement.rank == 1 else (Connected(), None)

    monkeypatch.setattr(module, "_connect_gloo", connect)
    texts = [str(error) for error in meet(store_path, on_cpus(3))]
    assert texts == ["1 of 3 ranks failed to connect over gloo", "too many open files", texts[0]]
    assert sorted(tried) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_ranks_on_one_gpu_connect_over_gloo(store_path: str, attempts: list[int]) -> None:
    """D36: NCCL refuses two ranks on one GPU."""
    meet(store_path, [RankPlacement(rank, 2, num_ranks_per_device=2, gpu=0) for rank in range(2)])
    assert sorted(attempts) == [0, 1]


@pytest.mark.parametrize("before", [None, "3"])
def test_nccl_connects_without_watchdog_when_all_have_come(store_path: str, monkeypatch, before: str | None) -> None:
    """D33: it cannot be interrupted while it waits for a rank. Other groups of the program keep torch's watchdog,
    though engines start in several threads at once.
    """
    if before is None:
        monkeypatch.delenv(WATCHDOG, raising=False)
    else:
        monkeypatch.setenv(WATCHDOG, before)
    come: list[int] = []

    def new_group(placement: RankPlacement, store: Any) -> tuple[int, str]:
        time.sleep(0.05)
        return len(come), os.environ[WATCHDOG]

    def come_late(rank: int) -> None:
        time.sleep(0.1 * rank)
        come.append(rank)

    monkeypatch.setattr(module, "new_nccl_group", new_group)
    placements = [RankPlacement(rank, 3, num_ranks_per_device=1, gpu=rank) for rank in range(3)]
    assert meet(store_path, placements, come_late) == [(3, "0")] * 3
    assert os.environ.get(WATCHDOG) == before


@pytest.mark.parametrize(("gpu", "per_device"), [(None, 2), (0, 1)], ids=["gloo", "nccl"])
def test_check_ends_the_waiting_for_a_rank_that_never_comes(store_path, monkeypatch, attempts, gpu, per_device) -> None:
    """D33."""
    num_checks, sleeps = 0, iter(range(20))

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 5:
            raise InterruptedError("over")

    # Ends a test that waits without a check.
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: next(sleeps)))
    with pytest.raises(InterruptedError, match=r"^over$"):
        rendezvous(RankPlacement(0, 2, per_device, gpu), open_store(store_path, 2), check)
    assert (num_checks, attempts) == (5, [])
