"""TensorParallel over real gloo groups, sizes that ranks divide, and the guard of its collectives."""

import os
import signal
import threading
import weakref
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.distributed import process_group, rendezvous
from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.process_group import DaemonThread
from nanovllm.distributed.tensor_parallel import TensorParallel
from tests.support.limits import HANG_SECONDS
from tests.support.parallel_ranks import run_together


def test_ranks_sum_gather_and_broadcast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D37: rows of a batch stay rows; rank r's columns stand at place r. D30: the minimum is every rank's."""

    def work(rank: int) -> tuple[Any, ...]:
        store = process_group.FileStore(str(tmp_path / "store"), 2)
        placement = RankPlacement(rank, 2, num_ranks_per_device=2)
        tp = process_group.init_process_group(placement, store, rendezvous.rendezvous)
        x = 10.0 * tp.rank + torch.arange(6.0).view(2, 3)
        gathered = tp.gather(x.T.contiguous().T)
        tokens = tp.broadcast(torch.tensor([3, 4]) if tp.rank == 0 else torch.empty(2, dtype=torch.int64))
        ranks = tp.all_gather(torch.tensor([tp.rank])).tolist()
        results = tp.all_reduce(x.clone()).tolist(), tokens.tolist(), tp.all_reduce_min(7 - tp.rank), ranks
        process_group.destroy_process_group(tp)
        return *results, None if gathered is None else gathered.tolist()

    monkeypatch.setattr(rendezvous, "NO_TIMEOUT", timedelta(seconds=HANG_SECONDS))
    first, second = run_together(work, [0, 1])
    same = [[10.0, 12.0, 14.0], [16.0, 18.0, 20.0]], [3, 4], 6, [[0], [1]]
    assert first == (*same, [[0.0, 1.0, 2.0, 10.0, 11.0, 12.0], [3.0, 4.0, 5.0, 13.0, 14.0, 15.0]])
    assert second == (*same, None)


def test_one_rank_needs_no_group() -> None:
    tp, x = TensorParallel(0, 1), torch.ones(2, 3)
    assert all(collective(x) is x for collective in (tp.all_reduce, tp.gather, tp.broadcast))
    assert tp.all_reduce_min(5) == tp.divide("vocab_size", 5) == 5
    assert tp.is_graph_safe


@pytest.mark.parametrize(("backend", "is_safe"), [("nccl", True), ("gloo", False)])
def test_a_graph_can_record_the_collectives_of_nccl_alone(backend: str, is_safe: bool) -> None:
    assert TensorParallel(0, 2, SimpleNamespace(name=lambda: backend)).is_graph_safe is is_safe


def test_a_size_that_the_ranks_cannot_divide_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="vocab_size must be divisible by the tensor-parallel size 4, got 10"):
        TensorParallel(0, 4).divide("vocab_size", 10)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_group_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="rank must be from 0 to size - 1"):
        TensorParallel(rank, size)


class Group:
    """Launches for as long as the test wants, and records what happens."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.is_launching, self.may_end = events, threading.Event(), threading.Event()

    def name(self) -> str:
        return "gloo"

    def allreduce(self, *_: Any) -> Any:
        self.events.append("begins to launch")
        self.is_launching.set()
        self.may_end.wait(HANG_SECONDS)
        self.events.append("has launched")
        return self

    gather = broadcast = allreduce

    def wait(self) -> None:
        pass

    def abort(self) -> None:
        self.events.append("aborts")


def launching(collective: Any, group: Group) -> tuple[TensorParallel, threading.Thread]:
    """A thread that launches a collective of the group."""
    tp = TensorParallel(0, 2, group)
    thread = threading.Thread(target=collective, args=[tp, torch.ones(1)])
    thread.start()
    assert group.is_launching.wait(HANG_SECONDS)
    return tp, thread


@pytest.mark.parametrize("name", ["all_reduce", "gather", "broadcast", "all_reduce_min"])
def test_a_group_is_not_aborted_while_a_collective_is_launched(name: str) -> None:
    """D33: NCCL frees what the launch is about to use; the GPU reads it then, and is lost to the whole process."""

    def collective(tp: TensorParallel, x: Any) -> None:
        getattr(tp, name)(3 if name == "all_reduce_min" else x)

    tp, thread = launching(collective, group := Group(events := []))
    aborted = process_group.abort_process_group(tp)
    threading.Timer(0.1, group.may_end.set).start()
    aborted.join(HANG_SECONDS)
    thread.join()
    assert events == ["begins to launch", "has launched", "aborts"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^the ranks' process group has been aborted, since .* failed$"):
            collective(tp, torch.ones(1))
    assert events[3:] == []


def test_a_launch_that_waits_for_a_full_gpu_does_not_delay_the_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: for the GPU waits for the rank that failed."""
    monkeypatch.setattr(process_group, "ABORT_DRAIN_TIMEOUT_S", 0.1)
    tp, thread = launching(TensorParallel.all_reduce, group := Group(events := []))
    process_group.abort_process_group(tp).join(HANG_SECONDS)
    group.may_end.set()
    thread.join()
    assert events == ["begins to launch", "aborts", "has launched"]
    with pytest.raises(RuntimeError, match="has been aborted"):
        tp.all_reduce(torch.ones(1))


def test_ctrl_c_while_a_thread_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt is raised when the thread has begun, so that joining it waits for its end."""
    has_run = threading.Event()
    start, thread = threading.Thread.start, DaemonThread(has_run.set)

    def interrupted_start(self: threading.Thread) -> None:
        if self is not thread:
            return start(self)
        threading.Timer(0.05, start, [thread]).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
    thread.join(HANG_SECONDS)
    assert has_run.is_set()


def test_ctrl_c_while_a_thread_is_waited_for(ctrl_c_raises: None) -> None:
    """Python 3.11 and 3.12 take a thread for ended whose join() was interrupted."""
    thread = DaemonThread((may_end := threading.Event()).wait)
    thread.start()
    interrupt = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        interrupt.start()
        thread.join(HANG_SECONDS)
    assert thread.is_alive()
    threading.Timer(0.1, may_end.set).start()
    thread.join(HANG_SECONDS)
    assert may_end.is_set()
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [None, ValueError("wrong")])
def test_an_ended_thread_holds_nothing_of_its_work(error: Exception | None) -> None:
    """D34: nor does the error, in whose traceback the work's frames are."""

    def work(tensor: torch.Tensor) -> None:
        if error is not None:
            raise error

    thread = DaemonThread(partial(work, tensor := torch.zeros(1)))
    freed = weakref.ref(tensor)
    del tensor
    thread.start()
    thread.join(HANG_SECONDS)
    assert freed() is None
    with pytest.raises(ValueError, match="wrong") if error else nullcontext():
        thread.check()
