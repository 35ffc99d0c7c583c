"""TensorParallel over real gloo groups, and the arithmetic of shares."""

import threading
from concurrent.futures import FIRST_EXCEPTION, wait
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.worker import process_group
from nanovllm.worker.meeting import meet
from nanovllm.worker.process_group import FileStore, Place, in_background, join, leave
from tests.support.limits import HANG_SECONDS


def test_ranks_sum_and_gather_in_rank_order(tmp_path: Path) -> None:
    """D37: rows of a batch stay rows; rank r's columns stand at place r. D30: the minimum is every rank's."""

    def work(rank: int) -> tuple[Any, ...]:
        tp = join(Place(rank, 2, num_sharing=2), FileStore(str(tmp_path / "rendezvous"), 2), meet)
        x = 10.0 * rank + torch.arange(6.0).view(2, 3)
        gathered = tp.gather(x.T.contiguous().T)
        total, smallest = tp.all_reduce(x.clone()), tp.minimum(7 - rank)
        leave(tp)
        return total.tolist(), None if gathered is None else gathered.tolist(), smallest

    # In daemon threads: when one rank fails, the other may wait without end.
    ranks = [in_background(partial(work, rank)) for rank in range(2)]
    done, _ = wait(ranks, timeout=HANG_SECONDS, return_when=FIRST_EXCEPTION)
    for rank in done:
        rank.result()
    first, second = (rank.result(0) for rank in ranks)
    total = [[10.0, 12.0, 14.0], [16.0, 18.0, 20.0]]
    assert first == (total, [[0.0, 1.0, 2.0, 10.0, 11.0, 12.0], [3.0, 4.0, 5.0, 13.0, 14.0, 15.0]], 6)
    assert second == (total, None, 6)


def test_single_rank_needs_no_group() -> None:
    tp, x = TensorParallel(0, 1), torch.ones(2, 3)
    assert tp.all_reduce(x) is x
    assert tp.gather(x) is x
    assert tp.minimum(5) == tp.share("vocab_size", 5) == 5
    assert tp.is_graph_safe


def test_share_that_is_no_integer_is_refused_by_name():
    with pytest.raises(ValueError, match="vocab_size must be divisible by the tensor-parallel size 4, got 10"):
        TensorParallel(0, 4).share("vocab_size", 10)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_rank_outside_the_group_is_refused(rank, size):
    with pytest.raises(ValueError, match="rank must be from 0 to size - 1"):
        TensorParallel(rank, size)


class Group:
    """Launches for as long as the test wants, and writes down what happens."""

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

    gather = allreduce

    def wait(self) -> None:
        pass

    def abort(self) -> None:
        self.events.append("aborts")


COLLECTIVES = pytest.mark.parametrize(
    "collective",
    [lambda tp: tp.all_reduce(torch.ones(2)), lambda tp: tp.gather(torch.ones(2)), lambda tp: tp.minimum(3)],
    ids=["all_reduce", "gather", "minimum"],
)


@COLLECTIVES
def test_a_group_is_not_aborted_while_work_is_given_to_it(collective: Any) -> None:
    """D33: NCCL frees what that work is about to use; the GPU reads it then, and is lost to the whole process."""
    tp = TensorParallel(0, 2, group := Group(events := []))
    launching = threading.Thread(target=collective, args=[tp])
    launching.start()
    assert group.is_launching.wait(HANG_SECONDS)
    aborted = process_group.abort(tp)
    threading.Timer(0.1, group.may_end.set).start()
    aborted.result(HANG_SECONDS)
    launching.join()
    assert events == ["begins to launch", "has launched", "aborts"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the ranks' group has been aborted: one of them has failed"):
            collective(tp)
    assert events[3:] == []


def test_work_that_waits_for_a_full_gpu_does_not_hold_up_the_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    """D33: for the GPU waits for the rank that failed."""
    monkeypatch.setattr(process_group, "LAUNCH_SECONDS", 0.1)
    tp = TensorParallel(0, 2, group := Group(events := []))
    launching = threading.Thread(target=tp.all_reduce, args=[torch.ones(2)])
    launching.start()
    assert group.is_launching.wait(HANG_SECONDS)
    process_group.abort(tp).result(HANG_SECONDS)
    group.may_end.set()
    launching.join()
    assert events == ["begins to launch", "aborts", "has launched"]
    with pytest.raises(RuntimeError, match="has been aborted"):
        tp.all_reduce(torch.ones(2))
