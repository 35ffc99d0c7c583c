"""Rank 0 watches ranks that are only pipes here: when all are ready, who failed first, and what ends then."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.worker import local_ranks
from nanovllm.worker.local_ranks import LocalRanks, RankError
from nanovllm.worker.process_group import Place
from nanovllm.worker.rank_process import READY
from tests.support.limits import HANG_SECONDS
from tests.unit.worker.test_local_ranks import report


class Group:
    """A group over `backend`. on_abort: what its abort does."""

    def __init__(self, backend: str, on_abort: Callable[[], Any] = lambda: None) -> None:
        self.backend, self.num_aborts, self.on_abort = backend, 0, on_abort

    def name(self) -> str:
        return self.backend

    def abort(self) -> None:
        self.num_aborts += 1
        self.on_abort()


class Watched:
    """Rank 0's view of ranks whose pipes the test holds, and the thread that listens to them."""

    def __init__(self, num_others: int, group: Any = None) -> None:
        self.num_killed = 0
        self.view: Any = object.__new__(LocalRanks)
        self.view.place = Place(0, 1 + num_others, num_sharing=1 + num_others)
        self.view._tp = None if group is None else TensorParallel(0, 1 + num_others, group)
        self.view._aborted, self.view._is_broken = None, False
        self.view._resources = ExitStack()
        self.view._all_ready, self.view._failure = Future(), Future()
        process = SimpleNamespace(kill=self._kill, exitcode=-9, join=lambda timeout: None, close=lambda: None)
        self.view._processes = [process] * num_others
        pipes = [Pipe(duplex=False) for _ in range(num_others)]
        self.view._reports = {pipes[i][0]: i + 1 for i in range(num_others)}
        self.ranks = [sender for _, sender in pipes]  # of ranks 1, 2, ...
        self.view._wake, self.view._wake_sender = Pipe(duplex=False)
        self.view._listener = threading.Thread(target=self.view._listen, daemon=True)
        self.view._listener.start()

    def _kill(self) -> None:
        self.num_killed += 1

    def failure(self) -> str:
        return str(self.view._failure.result(HANG_SECONDS))


def test_the_ranks_are_ready_when_all_are() -> None:
    watched = Watched(2)
    watched.ranks[1].send(READY)
    time.sleep(0.1)  # for the thread, which is to do nothing
    assert not watched.view._all_ready.done()
    watched.ranks[0].send(READY)
    watched.view._all_ready.result(HANG_SECONDS)
    watched.view._stop_listening()
    assert not watched.view._listener.is_alive()
    assert not watched.view.is_broken


def test_the_first_to_fail_is_heard_though_it_speaks_later() -> None:
    """D33: it may have had more to clear up than those that failed because of it."""
    watched = Watched(2)
    watched.ranks[0].send(report("consequence", 2.0))
    time.sleep(0.1)
    watched.ranks[1].send(report("cause", 1.0))
    assert watched.failure().startswith("rank 2 of 3 failed: cause")
    assert watched.num_killed == 2


def test_a_rank_that_hangs_does_not_hold_up_the_failure_of_another() -> None:
    """D33: it sits in a collective, and says nothing."""
    watched = Watched(2)
    watched.ranks[1].send(report("cause", 1.0))
    assert watched.failure().startswith("rank 2 of 3 failed: cause")
    assert watched.num_killed == 2


def test_a_rank_that_ends_without_a_word_is_noticed_by_its_pipe() -> None:
    """D33."""
    watched = Watched(1)
    watched.ranks[0].close()
    assert watched.failure().startswith("rank 1 of 2 was killed by SIGKILL")


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_what_waits_for_the_others_on_a_gpu_is_aborted(backend: str) -> None:
    """D33: a kernel of NCCL's does not notice that a connection closes; gloo does, and rank 0 may be inside."""
    watched = Watched(1, group := Group(backend))
    watched.ranks[0].send(report("cause", 1.0))
    watched.failure()
    watched.view._stop_listening()
    assert group.num_aborts == (backend == "nccl")
    watched.view.close()
    assert group.num_aborts == 1


def test_the_failure_is_known_before_rank_0_is_let_go() -> None:
    """D33: else it would take for a result what a broken collective left."""
    known: list[bool] = []
    watched = Watched(1, Group("nccl", on_abort=lambda: known.append(watched.view._failure.done())))
    watched.ranks[0].send(report("cause", 1.0))
    watched.failure()
    watched.view._stop_listening()
    watched.view.close()
    assert known == [True]


def test_an_abort_that_waits_for_graphs_does_not_hold_up_rank_0_which_holds_them() -> None:
    """D33 D35: closing comes after the graphs, and does wait, so that nothing is left."""
    graphs_are_gone = threading.Event()
    watched = Watched(1, Group("nccl", on_abort=lambda: graphs_are_gone.wait(HANG_SECONDS) and ended.append(True)))
    ended: list[bool] = []
    watched.ranks[0].send(report("cause", 1.0))
    watched.failure()
    watched.view.break_off()
    assert not ended
    threading.Timer(0.1, graphs_are_gone.set).start()
    watched.view.close()
    assert ended == [True]


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_rank_0s_own_failure_aborts_the_group(backend: str) -> None:
    """D33: what it has launched waits for the ranks that it kills, and freeing memory would wait for that."""
    is_aborted = threading.Event()
    watched = Watched(1, group := Group(backend, on_abort=is_aborted.set))
    watched.view.break_off()
    assert is_aborted.wait(HANG_SECONDS)  # before close, which comes after the memory
    watched.view.close()
    assert group.num_aborts == 1


def test_a_group_that_all_leave_is_not_aborted() -> None:
    watched = Watched(1, group := Group("nccl"))
    watched.view._stop_listening()
    watched.view.close()
    assert group.num_aborts == 0


def test_a_rank_that_fails_when_all_have_just_met_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: the listening thread, which saw no group to abort, leaves that to rank 0."""
    watched = Watched(1)
    watched.view._store_path = "store"

    class Joined(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            watched.ranks[0].close()
            watched.failure()
            return super().result(timeout)

    joined = Joined()
    joined.set_result(TensorParallel(0, 2, group := Group("nccl")))
    monkeypatch.setattr(local_ranks, "FileStore", lambda *_: None)
    monkeypatch.setattr(local_ranks, "in_background", lambda _: joined)
    watched.ranks[0].send(READY)
    with pytest.raises(RankError, match="rank 1 of 2 was killed"):
        watched.view.connect()
    watched.view.break_off()
    watched.view.close()
    assert group.num_aborts == 1


def test_rank_0_does_not_wait_to_meet_a_rank_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """D33 D34: nor does its thread go on when nobody waits for it."""
    watched = Watched(1)
    watched.view._store_path = "store"
    has_ended = threading.Event()

    def meet(place: Place, store: Any, check: Callable[[], None]) -> None:
        watched.ranks[0].send(report("cause", 1.0))
        try:
            for _ in range(100 * HANG_SECONDS):
                check()
                time.sleep(0.01)
        finally:
            has_ended.set()

    monkeypatch.setattr(local_ranks, "FileStore", lambda *_: None)
    monkeypatch.setattr(local_ranks, "meet", meet)
    monkeypatch.setattr(local_ranks, "join", lambda place, store, connect: connect(place, store))
    watched.ranks[0].send(READY)
    with pytest.raises(RankError, match="rank 1 of 2 failed: cause"):
        watched.view.connect()
    assert has_ended.is_set()


def test_rank_0_does_not_begin_to_meet_a_rank_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: it may have been killed while it imported the program."""
    watched = Watched(1)
    watched.view._processes[0].exitcode = 1
    watched.ranks[0].close()
    monkeypatch.setattr(local_ranks, "FileStore", lambda *_: pytest.fail("begins to meet it"))
    with pytest.raises(RankError, match="while it started"):
        watched.view.connect()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), ValueError("wrong"), KeyboardInterrupt()])
def test_rank_0s_own_error_is_not_explained_by_another_rank(error: BaseException) -> None:
    """D33."""
    watched = Watched(1)
    watched.ranks[0].send(report("rank 0 has gone", 1.0))
    watched.failure()
    assert watched.view.explain(error) is error
    assert str(watched.view.explain(RuntimeError("connection closed"))).startswith("rank 1 of 2 failed")


def test_ranks_of_a_lost_group_are_not_asked_to_end() -> None:
    """D34: nobody reads the channel any more, and a sender waits for its readers."""
    watched = Watched(1)
    watched.view._channel = SimpleNamespace(send=lambda *_: pytest.fail("sends to ranks that were killed"))
    watched.view.break_off()
    watched.view.say_end()
    assert watched.num_killed == 1
    assert watched.view.is_broken


def test_a_rank_that_does_not_read_holds_up_the_end_for_a_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """D34: it is killed then."""
    monkeypatch.setattr(local_ranks, "END_SECONDS", 0.1)
    looks = 0

    def send(message: object, check: Callable[[], None]) -> None:
        nonlocal looks
        while looks < 100 * HANG_SECONDS:
            looks += 1
            check()
            time.sleep(0.01)
        pytest.fail("waits for ever")

    watched = Watched(1)
    watched.view._channel = SimpleNamespace(send=send)
    watched.view.say_end()
    assert looks > 1


@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_reaches_rank_0_after_the_ranks_were_started(fails: bool) -> None:
    """D33: they inherit that it is blocked, and rank 0 is not left so, though one may fail to start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        with local_ranks._sigint_blocked():
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
            if fails:
                raise OSError("no more processes")
    except OSError:
        assert fails
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
