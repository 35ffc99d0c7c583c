"""LaunchedRanks without torchrun: a store in this process, and a control group that is a queue."""

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nanovllm.worker import launched_ranks
from nanovllm.worker.launched_ranks import LaunchedRanks, serve_launched
from nanovllm.worker.local_ranks import RankError
from nanovllm.worker.process_group import Place, gloo, nccl

SIZE = 3


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LaunchedRanks]:
    """Makes the LaunchedRanks of a rank; all of a test meet in one store."""
    store = dist.HashStore()
    monkeypatch.setattr(launched_ranks, "rendezvous", lambda url: iter([(store, None, None)]))
    monkeypatch.setattr(launched_ranks, "PATIENCE_SECONDS", 0.2)

    def make(rank: int, **place: Any) -> LaunchedRanks:
        monkeypatch.setattr(launched_ranks, "_has_joined", False)
        return LaunchedRanks(Place(rank, SIZE, num_sharing=1, **place))

    return make


class Control:
    """What rank 0 broadcasts, the others get, in its order."""

    def __init__(self, rank: int, sent: SimpleQueue) -> None:
        self._rank, self._sent = rank, sent

    def broadcast(self, tensors: list[torch.Tensor], options: object) -> "Control":
        if self._rank == 0:
            self._sent.put(tensors[0].clone())
        else:
            tensors[0].copy_(self._sent.get_nowait())
        return self

    def wait(self) -> None: ...


def test_a_second_engine_is_refused(launched: Callable[..., LaunchedRanks]) -> None:
    """D32: the processes that torchrun started have gone with the first."""
    launched(0)
    with pytest.raises(RuntimeError, match=r"^a program under torchrun starts one engine with several ranks"):
        LaunchedRanks(Place(0, SIZE, num_sharing=1))


@pytest.mark.parametrize("message", [None, [1, 2, 3], {"text": "x" * 100_000}])
def test_messages_of_any_size_arrive(launched: Callable[..., LaunchedRanks], message: Any) -> None:
    """D31."""
    sent: SimpleQueue = SimpleQueue()
    sender, receiver = launched(0), launched(1)
    sender._control, receiver._control = Control(0, sent), Control(1, sent)
    for each in (message, "and another"):
        sender.send(each)
        assert receiver.receive() == each
    assert sent.empty()


# --- failures ---


def test_the_first_word_is_what_rank_0_says(launched: Callable[..., LaunchedRanks]) -> None:
    """D33: the rank, the cause and its traceback; who failed later may have failed in consequence."""
    try:
        raise ArithmeticError("planted")
    except ArithmeticError as error:
        launched(2).leave_word(2, error)
    launched(1).leave_word(1, RuntimeError("connection closed"))
    said = launched(0).explain(RuntimeError("connection closed"))
    assert isinstance(said, RankError)
    assert str(said).startswith("rank 2 of 3 failed: ArithmeticError: planted\n\nIts traceback:\nTraceback")
    assert 'raise ArithmeticError("planted")' in str(said)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("mine"), ValueError("mine"), KeyboardInterrupt()])
def test_what_nobody_else_can_have_caused_is_rank_0_s_own(
    launched: Callable[..., LaunchedRanks], error: BaseException
) -> None:
    """D33."""
    launched(1).leave_word(1, RuntimeError("another"))
    assert launched(0).explain(error) is error


def test_without_a_word_rank_0_says_its_own_error(launched: Callable[..., LaunchedRanks]) -> None:
    error = RuntimeError("mine")
    assert launched(0).explain(error) is error


def test_a_word_that_comes_late_is_waited_for(
    launched: Callable[..., LaunchedRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D33: rank 0 may notice the connection before the other rank has written why."""
    other, rank_0 = launched(1), launched(0)
    sleeps: list[float] = []

    def speak(seconds: float) -> None:
        sleeps.append(seconds)
        other.leave_word(1, ValueError("late"))

    monkeypatch.setattr(launched_ranks.time, "sleep", speak)
    assert str(rank_0.explain(RuntimeError("connection closed"))).startswith("rank 1 of 3 failed: ValueError: late")
    assert len(sleeps) == 1


def test_a_rank_that_fails_leaves_word_and_fails(
    launched: Callable[..., LaunchedRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D33: torchrun sees its exit code."""
    rank_0 = launched(0)
    monkeypatch.setattr(launched_ranks, "_has_joined", False)
    monkeypatch.setattr(LaunchedRanks, "connect", lambda self: "a group")

    def serve(model: Any, place: Place, tp: Any, receive: Any) -> None:
        assert (model, place.rank, tp) == ("a model", 1, "a group")
        raise LookupError("planted")

    monkeypatch.setattr(launched_ranks, "serve", serve)
    model: Any = "a model"
    with pytest.raises(LookupError, match="planted"):
        serve_launched(model, Place(1, SIZE, num_sharing=1))
    assert str(rank_0.explain(RuntimeError("gone"))).startswith("rank 1 of 3 failed: LookupError: planted")


# --- the groups ---


@pytest.mark.parametrize(("smallest", "connect"), [(1, nccl), (0, gloo)])
@pytest.mark.parametrize("gpu", [None, 0])
def test_nccl_takes_a_gpu_for_each_rank_of_all_machines(
    launched: Callable[..., LaunchedRanks],
    monkeypatch: pytest.MonkeyPatch,
    smallest: int,
    connect: Any,
    gpu: int | None,
) -> None:
    """D36: what this rank has does not decide."""
    asked: list[Any] = []

    class Everyone:
        def __init__(self, rank: int, size: int, group: Any) -> None:
            asked.append((rank, size, group))

        def minimum(self, value: int) -> int:
            asked.append(value)
            return smallest

    joined: list[Any] = []
    monkeypatch.setattr(launched_ranks, "TensorParallel", Everyone)
    monkeypatch.setattr(launched_ranks, "gloo", lambda place, store: "control")
    monkeypatch.setattr(launched_ranks, "join", lambda place, store, connect: joined.append(connect))
    launched(1, gpu=gpu).connect()
    assert asked == [(1, SIZE, "control"), gpu is not None]
    assert joined == [nccl if connect is nccl else launched_ranks.gloo]


def test_the_end_is_said_once_and_not_to_a_broken_group(launched: Callable[..., LaunchedRanks]) -> None:
    """D34: to a rank that has gone already, too."""
    sent: SimpleQueue = SimpleQueue()
    ranks, other = launched(0), launched(1)
    ranks._control, other._control = Control(0, sent), Control(1, sent)
    ranks.say_end()
    assert other.receive() is None
    ranks.break_off()
    ranks.say_end()
    assert sent.empty()

    class Gone:
        def broadcast(self, *_: object) -> None:
            raise RuntimeError("connection closed by peer")

    ranks = launched(0)
    ranks._control = Gone()
    ranks.say_end()
