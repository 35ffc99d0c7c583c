"""Ranks that torchrun started, here each in a thread: what they send each other, and the word of one that fails.

A store in memory stands in for torchrun's. What they connect over gloo ends after some seconds, so that nothing waits
for ever.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nanovllm import Config
from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.torchrun import Launch
from nanovllm.worker import executor, launched_ranks, process_group
from nanovllm.worker.launched_ranks import LaunchedRanks, serve_launched
from nanovllm.worker.local_ranks import RankError
from nanovllm.worker.process_group import Place
from nanovllm.worker.rank_process import Model
from tests.support.limits import HANG_SECONDS

HANG = timedelta(seconds=HANG_SECONDS)
MODEL: Any = Model(Config("any", tensor_parallel_size=2, device="cpu"), None, None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store, and a program that has started no engine yet."""
    store = dist.HashStore()
    monkeypatch.setattr(launched_ranks, "rendezvous", lambda url: iter([(store, None, None)]))
    monkeypatch.setattr(launched_ranks, "_has_joined", False)
    monkeypatch.setattr(process_group, "REMOTE_MEETING", HANG)
    monkeypatch.setattr(process_group, "FOR_EVER", HANG)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def make_ranks(*places: Place) -> list[LaunchedRanks]:
    """Each as if it were alone in its process."""
    ranks = []
    for place in places:
        launched_ranks._has_joined = False
        ranks.append(LaunchedRanks(place))
    return ranks


def on_cpus(size: int) -> list[LaunchedRanks]:
    return make_ranks(*(Place(rank, size, num_sharing=size) for rank in range(size)))


def on_all(ranks: list[LaunchedRanks], work: Callable[[LaunchedRanks], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(work, ranks))


def test_messages_arrive_whole_and_in_order_until_the_end() -> None:
    """Of any length: the receivers learn it first."""
    messages = ["x" * 300, b"\0" * 2**17, {"a": [1, 2]}]

    def work(ranks: LaunchedRanks) -> list[Any]:
        ranks.connect()
        if ranks.place.rank:
            return list(iter(ranks.receive, None))
        for message in messages:
            ranks.send(message)
        ranks.say_end()
        return messages

    assert on_all(on_cpus(3), work) == [messages] * 3


def test_tensors_go_over_a_group_of_their_own() -> None:
    def work(ranks: LaunchedRanks) -> tuple[float, bool]:
        tp = ranks.connect()
        return float(tp.all_reduce(torch.tensor([tp.rank + 1.0]))), tp.group is ranks._control

    assert on_all(on_cpus(3), work) == [(6.0, False)] * 3


@pytest.mark.parametrize(
    ("sharing", "expected"), [([1, 1], "nccl"), ([2, 1], "gloo"), ([1, 2], "gloo"), ([2, 2], "gloo")]
)
def test_nccl_needs_a_gpu_for_every_rank(monkeypatch: pytest.MonkeyPatch, sharing: list[int], expected: str) -> None:
    """D36: on one machine ranks may share a GPU, and on another not; all must connect in the same way."""
    monkeypatch.setattr(launched_ranks, "join", lambda place, store, connect: SimpleNamespace(group=connect.__name__))
    ranks = make_ranks(*(Place(rank, 2, num_sharing, gpu=0) for rank, num_sharing in enumerate(sharing)))
    assert on_all(ranks, lambda ranks: ranks.connect().group) == [expected] * 2


def test_a_second_engine_is_refused() -> None:
    """The other processes have ended with the first: it would wait for them."""
    first = LaunchedRanks(Place(0, 2, num_sharing=2))
    first.close()
    with pytest.raises(RuntimeError, match="a program under torchrun starts one engine with several ranks"):
        LaunchedRanks(Place(0, 2, num_sharing=2))


# --- when one fails ---


def test_the_first_failure_explains_what_rank_0_ran_into() -> None:
    """D33: those after it are its consequences."""
    rank_0, rank_1, rank_2 = on_cpus(3)
    rank_2.leave_word(2, planted(ArithmeticError("the cause")))
    rank_1.leave_word(1, RuntimeError("connection closed"))
    explained = rank_0.explain(RuntimeError("connection closed"))
    assert type(explained) is RankError
    first, _, traceback = str(explained).partition("\n\nIts traceback:\n")
    assert first == "rank 2 of 3 failed: ArithmeticError: the cause"
    assert "in planted\n" in traceback


def planted(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_rank_0_waits_for_the_word_of_a_rank_that_fails() -> None:
    """D33: a connection closes before the word of the rank at its other end has come."""
    rank_0, rank_1 = on_cpus(2)
    threading.Timer(0.3, rank_1.leave_word, (1, ArithmeticError("late"))).start()
    assert str(rank_0.explain(RuntimeError("connection closed"))).startswith("rank 1 of 2 failed: ArithmeticError")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), ValueError("wrong"), KeyboardInterrupt()])
def test_rank_0s_own_error_is_not_explained_by_another_rank(error: BaseException) -> None:
    """D33."""
    rank_0, rank_1 = on_cpus(2)
    rank_1.leave_word(1, RuntimeError("rank 0 has gone"))
    assert rank_0.explain(error) is error


@pytest.mark.parametrize("is_store_gone", [False, True])
def test_an_error_without_a_word_of_another_rank_stays(monkeypatch: pytest.MonkeyPatch, is_store_gone: bool) -> None:
    monkeypatch.setattr(launched_ranks, "PATIENCE_SECONDS", 0.1)
    (rank_0,) = make_ranks(Place(0, 2, num_sharing=2))
    if is_store_gone:
        rank_0._store = None
    error = RuntimeError("a bug of rank 0")
    assert rank_0.explain(error) is error


class Failing:
    """Serves as rank 1 of 2 and fails with `error` when it comes to `where`: connect or serve."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
        self.error = error
        monkeypatch.setattr(LaunchedRanks, "connect", lambda ranks: self._strike(where == "connect"))
        monkeypatch.setattr(launched_ranks, "serve", lambda *_: self._strike(where == "serve"))

    def _strike(self, is_here: bool) -> None:
        if is_here:
            raise self.error

    def serve(self) -> None:
        """Ends with the error: torchrun sees that the process failed, and ends the others."""
        with pytest.raises(type(self.error)) as caught:
            serve_launched(MODEL, Place(1, 2, num_sharing=2))
        assert caught.value is self.error


@pytest.mark.parametrize("where", ["connect", "serve"])
@pytest.mark.parametrize("error", [ArithmeticError("oh"), SystemExit("oh")])
def test_a_rank_that_fails_leaves_word(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    """D33."""
    (rank_0,) = make_ranks(Place(0, 2, num_sharing=2))
    launched_ranks._has_joined = False
    Failing(monkeypatch, where, error).serve()
    said = str(rank_0.explain(RuntimeError("connection closed")))
    assert said.startswith(f"rank 1 of 2 failed: {type(error).__name__}: oh\n")


def test_a_rank_that_cannot_leave_word_ends_with_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store goes with rank 0."""
    monkeypatch.setattr(launched_ranks, "rendezvous", lambda url: iter([(None, None, None)]))
    Failing(monkeypatch, "serve", ArithmeticError("oh")).serve()


# --- the end ---


class Control:
    """A group that writes down what is broadcast, or fails."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.num_broadcasts = 0

    def broadcast(self, *_: object) -> "Control":
        self.num_broadcasts += 1
        if self.fails:
            raise RuntimeError("connection closed by peer")
        return self

    def wait(self) -> None:
        pass


def test_a_lost_group_is_not_asked_to_end() -> None:
    """D35: the others do not listen any more."""
    (rank_0,) = make_ranks(Place(0, 2, num_sharing=2))
    rank_0._control = control = Control()
    rank_0.break_off()
    rank_0.say_end()
    assert rank_0.is_broken
    assert control.num_broadcasts == 0


def test_a_lost_group_is_aborted_and_its_end_waited_for() -> None:
    """D33 D35: NCCL's waits for graphs, which are freed in between."""
    events: list[str] = []

    def abort() -> None:
        graphs_are_gone.wait(HANG.total_seconds())
        events.append("aborted")

    graphs_are_gone = threading.Event()
    (rank_0,) = make_ranks(Place(0, 2, num_sharing=2))
    rank_0._tp = TensorParallel(0, 2, SimpleNamespace(abort=abort))
    rank_0.break_off()
    threading.Timer(0.1, graphs_are_gone.set).start()
    rank_0.close()
    assert events == ["aborted"]


def test_a_rank_that_has_gone_already_does_not_spoil_the_end() -> None:
    """D34: close() does not raise. The group's connections close when nobody holds it."""
    (rank_0,) = make_ranks(Place(0, 2, num_sharing=2))
    rank_0._control = Control(fails=True)
    control = weakref.ref(rank_0._control)
    rank_0.say_end()
    assert control().num_broadcasts == 1
    rank_0.close()
    assert control() is None


# --- who gets an engine ---


@pytest.mark.parametrize("launch", [Launch(1, 2, 1, 2), Launch(1, 2, 0, 1)])
def test_another_rank_serves_and_ends_well(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    """The first of the second machine too: its program never comes to what follows the engine."""
    served: list[Place] = []
    monkeypatch.setattr(executor, "read_launch", lambda: launch)
    monkeypatch.setattr(executor, "serve_launched", lambda model, place: served.append(place))
    with pytest.raises(SystemExit) as caught:
        executor._other_ranks(MODEL)
    assert caught.value.code == 0
    assert served == [Place(1, 2, num_sharing=launch.local_size)]
