"""TorchrunExecutor and its channel: the messages between the ranks, and the report of a rank that fails.

Each rank runs in a thread, and a HashStore replaces torchrun's store. The gloo groups have a timeout, so a test that
fails does not hang.
"""

import weakref
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nanovllm import Config
from nanovllm.distributed import process_group
from nanovllm.distributed.placement import RankPlacement
from nanovllm.executor import base, torchrun
from nanovllm.executor.base import make_executor
from nanovllm.executor.torchrun import TorchrunChannel, TorchrunExecutor, run_torchrun_worker
from nanovllm.executor.worker_main import WorkerSpec
from nanovllm.torchrun_env import TorchrunEnv
from tests.support.limits import HANG_SECONDS
from tests.support.parallel_ranks import run_together

HANG = timedelta(seconds=HANG_SECONDS)
CONFIG = Config("any", tensor_parallel_size=2, device="cpu")
SPEC: Any = WorkerSpec(CONFIG, None, None)  # type: ignore[arg-type]
ENVS = [TorchrunEnv(rank, 2, rank, 2) for rank in range(2)]


@pytest.fixture(autouse=True)
def _torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces torchrun's store, sets timeouts, and resets the state of a process that has started an engine."""
    store = dist.HashStore()
    monkeypatch.setattr(torchrun, "rendezvous", lambda url: iter([(store, None, None)]))
    monkeypatch.setattr(torchrun, "_has_connected", False)
    monkeypatch.setattr(process_group, "REMOTE_CONNECT_TIMEOUT", HANG)
    monkeypatch.setattr(process_group, "NO_TIMEOUT", HANG)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def make_channels(*placements: RankPlacement) -> list[TorchrunChannel]:
    """One channel per placement, each created as if it were the only one in its process."""
    channels = []
    for placement in placements:
        torchrun._has_connected = False
        channels.append(TorchrunChannel(placement))
    torchrun._has_connected = False
    return channels


def on_cpus(size: int) -> list[TorchrunChannel]:
    return make_channels(*(RankPlacement(rank, size, num_ranks_per_device=size) for rank in range(size)))


def test_messages_arrive_whole_and_in_order_and_tensors_have_a_group_of_their_own() -> None:
    """Messages of any length: the receivers learn it first."""
    messages: list[Any] = ["x" * 300, b"\0" * 2**17, {"a": [1, 2]}]

    def work(channel: TorchrunChannel) -> tuple[list[Any], float, bool]:
        tp = channel.connect()
        total = float(tp.all_reduce(torch.tensor([tp.rank + 1.0])))
        received = messages
        if tp.rank > 0:
            received = list(iter(channel.receive, None))
        else:
            for message in [*messages, None]:
                channel.send(message)
        return received, total, tp.group is channel._control.group

    assert run_together(work, on_cpus(3)) == [(messages, 6.0, False)] * 3


@pytest.mark.parametrize(("per_device", "expected"), [((1, 1), "nccl"), ((2, 1), "gloo"), ((1, 2), "gloo")])
def test_nccl_needs_a_gpu_for_every_rank(monkeypatch, per_device: tuple[int, int], expected: str) -> None:
    """D36: on one machine ranks may share a GPU, and on another not; all must connect in the same way."""
    monkeypatch.setattr(torchrun, "init_process_group", lambda placement, store, new_group: new_group.__name__)
    channels = make_channels(*(RankPlacement(rank, 2, count, gpu=0) for rank, count in enumerate(per_device)))
    assert run_together(TorchrunChannel.connect, channels) == [f"new_{expected}_group"] * 2


def test_a_second_engine_is_refused() -> None:
    """The other processes have ended with the first: it would wait for them."""
    TorchrunChannel(RankPlacement(0, 2, num_ranks_per_device=2)).close()
    with pytest.raises(RuntimeError, match="a program under torchrun starts one engine with several ranks"):
        TorchrunChannel(RankPlacement(0, 2, num_ranks_per_device=2))


# --- a failure ---


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_rank_0_reads_the_first_reported_failure() -> None:
    """D33: those after it are its consequences."""
    rank_0, rank_1, rank_2 = on_cpus(3)
    rank_2.report_failure(raised(ArithmeticError("the cause")))
    rank_1.report_failure(RuntimeError("connection closed"))
    first, _, traceback = str(rank_0.reported_failure(1)).partition("\n\nIts traceback:\n")
    assert first == "rank 2 of 3 failed: ArithmeticError: the cause"
    assert "in raised\n" in traceback


@pytest.mark.parametrize("store", ["empty", "ended"])
def test_without_a_report_there_is_no_root_cause(store: str) -> None:
    (rank_0,) = make_channels(RankPlacement(0, 2, num_ranks_per_device=2))
    if store == "ended":
        rank_0._store = None
    assert rank_0.reported_failure(0.1) is None


@pytest.mark.parametrize("where", ["connect", "compute"])
@pytest.mark.parametrize("error", [ArithmeticError("oh"), SystemExit("oh")])
@pytest.mark.parametrize("has_store", [True, False], ids=["", "rank 0 has ended"])
def test_a_worker_that_fails_reports_it_and_ends_with_its_own_error(monkeypatch, where, error, has_store) -> None:
    """D33: torchrun sees that the process failed, and ends the others. The store ends with rank 0."""
    (rank_0,) = make_channels(RankPlacement(0, 2, num_ranks_per_device=2))

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(TorchrunChannel, "connect", fail if where == "connect" else lambda channel: None)
    monkeypatch.setattr(torchrun, "worker_busy_loop", fail)
    if not has_store:
        monkeypatch.setattr(torchrun, "rendezvous", lambda url: iter([(None, None, None)]))
    with pytest.raises(type(error)) as caught:
        run_torchrun_worker(SPEC, ENVS[1])
    assert caught.value is error
    if has_store:
        assert str(rank_0.reported_failure(1)).startswith(f"rank 1 of 2 failed: {type(error).__name__}: oh\n")


def test_close_succeeds_when_the_other_ranks_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """D34. The control group's connections close when it has no references."""

    class Control:
        def broadcast(self, *_: object) -> None:
            raise RuntimeError("connection closed by peer")

    tp = SimpleNamespace(group=SimpleNamespace(shutdown=lambda: None), is_nccl=False, close_peers=lambda: None)
    runner: Any = SimpleNamespace(num_kv_cache_blocks=1, block_size=256, close=lambda: None)
    monkeypatch.setattr(TorchrunChannel, "connect", lambda channel: tp)
    monkeypatch.setattr(WorkerSpec, "make_runner", lambda *_: runner)
    executor = TorchrunExecutor(SPEC, ENVS[0])
    executor._channel._control = Control()
    control = weakref.ref(executor._channel._control)
    executor.close()
    executor.close()
    assert control() is None


def test_another_number_of_ranks_than_torchrun_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """D36: with both numbers."""
    monkeypatch.setattr(base, "read_torchrun_env", lambda: TorchrunEnv(0, 4, 0, 4))
    with pytest.raises(ValueError, match="the number of processes that torchrun started, 4, got 2"):
        make_executor(CONFIG, None, None, SPEC)  # type: ignore[arg-type]
