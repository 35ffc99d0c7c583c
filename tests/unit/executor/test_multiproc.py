"""MultiprocExecutor with processes that the test makes up: what rank 0 waits for, kills and aborts."""

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor import multiproc
from nanovllm.executor.base import RankError
from nanovllm.executor.failure_monitor import READY, State
from nanovllm.executor.multiproc import MultiprocExecutor
from nanovllm.executor.worker_main import WorkerSpec
from tests.support.limits import HANG_SECONDS, wait_until
from tests.unit.executor.test_failure_monitor import failure

SPEC: Any = WorkerSpec(Config("any", tensor_parallel_size=2, device="cpu"), None, None)  # type: ignore[arg-type]


class Group:
    """A process group. on_abort: what its abort does."""

    def __init__(self, backend: str, on_abort: Callable[[], Any] = lambda: None) -> None:
        self.backend, self.num_aborts, self.on_abort, self.is_shut_down = backend, 0, on_abort, False

    def name(self) -> str:
        return self.backend

    def abort(self) -> None:
        self.num_aborts += 1
        self.on_abort()

    def shutdown(self) -> None:
        self.is_shut_down = True


class Ranks:
    """Rank 0's executor and, in place of rank 1, the sender of its reports. join: in place of join_local_group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_kills = 0
        self.monkeypatch = monkeypatch

    def start(self, join: Callable[[], TensorParallel], on_start: Callable[[], None] = lambda: None) -> Any:
        process = SimpleNamespace(kill=self._kill, exitcode=-9, join=lambda timeout: None, close=lambda: None)

        def start_workers(executor: Any, spec: Any) -> None:
            self.executor, self.report = executor, executor._senders[1]
            executor._processes = [process]
            on_start()

        self.monkeypatch.setattr(multiproc, "require_importable_program", lambda: None)
        self.monkeypatch.setattr(MultiprocExecutor, "_start_workers", start_workers)
        self.monkeypatch.setattr(multiproc, "join_local_group", lambda placement, path, check: join())
        runner: Any = SimpleNamespace(num_kv_cache_blocks=1, block_size=256, close=lambda: None)
        self.monkeypatch.setattr(WorkerSpec, "make_runner", lambda *_: runner)
        return MultiprocExecutor(SPEC)

    def start_with(self, group: Group) -> Any:
        return self.start(lambda: TensorParallel(0, 2, group))

    def _kill(self) -> None:
        self.num_kills += 1

    def fail(self) -> None:
        """Rank 1 fails, and the monitor has noticed."""
        self.report.send(failure("cause"))
        assert self.executor._monitor.wait_for_root_cause(HANG_SECONDS)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_collective_that_waits_on_a_gpu_is_aborted(ranks: Ranks, backend: str) -> None:
    """D33: a kernel of NCCL's does not notice that a connection closes; gloo does, and rank 0 may be inside."""
    executor = ranks.start_with(group := Group(backend))
    ranks.fail()
    executor._monitor.stop()
    assert group.num_aborts == (backend == "nccl")
    executor.close()
    assert (group.num_aborts, group.is_shut_down) == (backend == "nccl", False)


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_rank_0s_own_failure_kills_the_workers_and_aborts_the_group(ranks: Ranks, backend: str) -> None:
    """D33: what it has launched waits for the ranks that it kills. close() waits for the abort, which waits for graphs
    that are freed in between (D35).
    """
    graphs_are_freed, ended = threading.Event(), []
    group = Group(backend, lambda: graphs_are_freed.wait(HANG_SECONDS) and ended.append(True))
    executor = ranks.start_with(group)
    executor._runner.close = lambda: threading.Timer(0.1, graphs_are_freed.set).start()
    with pytest.raises(AttributeError):
        executor.execute(SimpleNamespace())  # which the runner cannot run
    assert ended == [True]
    assert group.num_aborts == 1
    assert ranks.num_kills > 0
    assert executor._monitor._state is State.CLOSED


@pytest.mark.parametrize("num_kills", [1, 3], ids=["before rank 0 notices", "while rank 0 releases what it holds"])
def test_a_group_that_connects_although_a_rank_has_failed_is_aborted(ranks: Ranks, num_kills: int) -> None:
    """D33: the monitor's thread, which knew no group to abort, leaves that to rank 0."""

    def join() -> TensorParallel:
        ranks.fail()
        wait_until(lambda: ranks.num_kills >= num_kills)
        return TensorParallel(0, 2, group)

    group = Group("nccl")
    with pytest.raises(RankError, match="rank 1 of 2 failed: cause"):
        ranks.start(join)
    assert group.num_aborts == 1


def test_rank_0_does_not_wait_to_connect_to_a_rank_that_failed(ranks: Ranks) -> None:
    """D33 D34: the thread that connects notices it last, ends, and its error holds no group for the user's."""
    group = Group("gloo")
    freed = weakref.ref(group)

    def join(group: Group) -> TensorParallel:
        ranks.report.send(failure("cause"))
        for _ in range(100 * HANG_SECONDS):
            if ranks.num_kills == 3:  # by the monitor, by rank 0, and before rank 0 waits for this thread
                ranks.executor._monitor.check()
            time.sleep(0.01)
        raise AssertionError("nothing stops it")

    works = [partial(join, group)]
    del group
    with pytest.raises(RankError, match="rank 1 of 2 failed: cause") as caught:
        ranks.start(lambda: works.pop()())
    assert freed() is None
    assert "join" not in [frame.name for frame in caught.traceback], "another thread has raised the same exception"


def test_a_rank_that_does_not_read_delays_close_for_a_limited_time(ranks: Ranks) -> None:
    """D34: it is killed then."""
    ranks.monkeypatch.setattr(multiproc, "SHUTDOWN_TIMEOUT_S", 0.1)
    executor = ranks.start_with(Group("gloo"))
    ranks.report.send(READY)
    executor._send("a step that rank 1 does not read")
    executor.close()
    assert ranks.num_kills == 1
