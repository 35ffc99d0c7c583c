"""UniprocExecutor and MultiRankExecutor with stand-ins for the runner and the other ranks: the order of what they call,
what closes them and what they raise.
"""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import Config
from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.process_group import DaemonThread
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor import base, multi_rank, uniproc
from nanovllm.executor.base import RankError, free_frames, make_executor
from nanovllm.executor.failure_monitor import FailureMonitor, State
from nanovllm.executor.multi_rank import MultiRankExecutor
from nanovllm.executor.worker_main import StepMessage
from nanovllm.worker.async_output import AsyncModelOutput

BATCH: Any = SimpleNamespace(sampled_sequences=("a", "b"))
NEXT: Any = SimpleNamespace(sampled_sequences=("b",))
PLACEMENT = RankPlacement(0, 2, num_ranks_per_device=2)


class Parts:
    """A runner, a group and other ranks that record what is called, and raise what `errors` has under that name."""

    num_kv_cache_blocks, block_size = 5, 256
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.errors: dict[str, BaseException] = {}
        self.root_cause: RankError | None = None
        self.is_nccl = False

    def call(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments) if arguments else name)
        if name in self.errors:
            raise self.errors[name]

    def make_runner(self, *_: Any) -> "Parts":
        self.call("load")
        return self

    def run(self, batch: Any, *previous: Any) -> AsyncModelOutput:
        self.call("run", batch, *previous)
        return AsyncModelOutput(batch, torch.tensor([7, 8]))

    def close(self) -> None:
        self.call("free runner")

    def close_peers(self) -> None:
        self.call("close peers")


class Monitor(FailureMonitor):
    """Without workers, and so without a thread; records what it is asked."""

    def __init__(self, parts: Parts) -> None:
        super().__init__({})
        self.parts = parts

    def check(self) -> None:
        self.parts.call("check")

    def wait_for_root_cause(self, timeout: float) -> RankError | None:
        self.parts.call("wait for root cause")
        return self.parts.root_cause


class Ranks(MultiRankExecutor):
    """Other ranks that are the test's Parts."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts
        super().__init__(parts, PLACEMENT, Monitor(parts))

    def _connect(self, spec: Any) -> None:
        self._tp = self.parts

    def _send(self, message: StepMessage) -> None:
        self.parts.call("send", message)

    def _kill_workers(self) -> None:
        assert self._monitor.stop() is State.FAILED
        self.parts.call("terminate")

    def _request_shutdown(self) -> None:
        self.parts.call("request shutdown")

    def _wait_for_workers(self) -> None:
        self.parts.call("wait for workers")

    def _release(self) -> None:
        self.parts.call("release")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    parts = Parts()

    def abort_process_group(_: TensorParallel) -> DaemonThread:
        thread = DaemonThread(lambda: parts.call("abort"))
        thread.start()
        return thread

    monkeypatch.setattr(multi_rank, "destroy_process_group", lambda tp: parts.call("destroy group"))
    monkeypatch.setattr(multi_rank, "abort_process_group", abort_process_group)
    monkeypatch.setattr(uniproc, "ModelRunner", parts.make_runner)
    return parts


def make_uniproc(parts: Parts) -> uniproc.UniprocExecutor:
    return uniproc.UniprocExecutor(Config("any"), None, None)  # type: ignore[arg-type]


# --- a step ---


def test_a_step_is_sent_and_run_takes_pending_tokens_on_the_device_and_is_checked(parts: Any) -> None:
    executor = Ranks(parts)
    assert executor.num_kv_cache_blocks == 5
    pending = executor.execute(BATCH)
    assert parts.calls == ["load", ("send", StepMessage(BATCH)), ("run", BATCH, None, None)]
    executor.execute(NEXT, pending)
    assert parts.calls[3] == ("send", StepMessage(NEXT, ("a", "b")))
    assert parts.calls[4] == ("run", NEXT, ("a", "b"), pending.output.sampled)
    assert pending.token_ids() == [7, 8]
    assert parts.calls[5:] == ["check"]


def test_one_rank_sends_nothing(parts: Any) -> None:
    executor = make_uniproc(parts)
    pending = executor.execute(BATCH)
    executor.execute(NEXT, pending)
    assert pending.token_ids() == [7, 8]
    executor.close()
    executor.close()
    assert parts.calls == ["load", ("run", BATCH), ("run", NEXT, ("a", "b"), pending.sampled), "free runner"]
    assert executor.is_closed
    with pytest.raises(RuntimeError, match="this engine is closed: make a new one"):
        executor.execute(BATCH)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_nccl", [False, True])
def test_async_scheduling_is_supported_where_a_step_is_computed_on_gpus(parts: Any, device: str, is_nccl: bool) -> None:
    parts.device, parts.is_nccl = torch.device(device), is_nccl
    assert make_uniproc(parts).supports_async_scheduling is (device == "cuda")
    assert Ranks(parts).supports_async_scheduling is is_nccl


# --- the end ---

SHUTDOWN = ["request shutdown", "free runner", "destroy group", "wait for workers", "release"]
FAILURE = ["terminate", "abort", "free runner", "release", "close peers"]


def test_close_frees_the_graphs_before_the_group_and_that_before_the_processes(parts: Any) -> None:
    """D35. D34: twice."""
    executor = Ranks(parts)
    parts.calls.clear()
    executor.close()
    executor.close()
    assert parts.calls == SHUTDOWN
    assert executor.is_closed


@pytest.mark.parametrize("where", ["send", "run", "check"])
@pytest.mark.parametrize("error", [RuntimeError("connection closed"), ValueError("wrong"), KeyboardInterrupt()])
def test_any_exception_in_a_step_closes_the_executor(parts: Any, where: str, error: BaseException) -> None:
    """D33: the group is aborted before anything waits for the ranks."""
    executor = Ranks(parts)
    pending = executor.execute(BATCH)
    parts.errors[where] = error
    with pytest.raises(type(error)) as caught:
        executor.execute(NEXT, pending).token_ids()
    with pytest.raises(RuntimeError, match="the ranks of this engine have ended"):
        pending.output.sampled  # noqa: B018  (its memory is free, though the test has `pending` and the traceback)
    assert caught.value is error
    assert parts.calls[-5:] == FAILURE
    assert ("wait for root cause" in parts.calls) == isinstance(error, RuntimeError)
    assert executor.is_closed
    parts.calls.clear()
    with pytest.raises(RuntimeError, match="the ranks of this engine have ended: make a new one"):
        executor.execute(BATCH)
    executor.close()
    assert parts.calls == []


def test_the_root_cause_is_raised_from_what_rank_0_ran_into(parts: Any) -> None:
    """D33. Rank 0's own lack of memory has no other cause: tests/distributed/test_failures.py."""
    executor = Ranks(parts)
    parts.errors["run"], parts.root_cause = RuntimeError("connection closed"), RankError("rank 1 of 2 failed")
    with pytest.raises(RankError, match="rank 1 of 2 failed") as caught:
        executor.execute(BATCH)
    assert caught.value.__cause__ is parts.errors["run"]


def test_ctrl_c_while_the_root_cause_is_waited_for_closes_the_executor(parts: Any) -> None:
    """D33: the workers are killed, so none computes a later request from where it was."""
    executor = Ranks(parts)
    parts.errors |= {"run": RuntimeError("connection closed"), "wait for root cause": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        executor.execute(BATCH)
    assert parts.calls[-5:] == FAILURE
    assert executor.is_closed


@pytest.mark.parametrize("where", SHUTDOWN[:-1])
def test_ctrl_c_during_shutdown_leaves_nothing(parts: Any, where: str) -> None:
    """D34."""
    executor = Ranks(parts)
    parts.errors[where] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        executor.close()
    assert "terminate" in parts.calls
    assert parts.calls.count("free runner") == 1
    assert ("abort" in parts.calls) == (where != "wait for workers"), "a group that was not destroyed is aborted"
    assert parts.calls[-1] == ("release" if where == "wait for workers" else "close peers")


@pytest.mark.parametrize("make", [Ranks, make_uniproc])
def test_a_runner_that_cannot_start_leaves_nothing(parts: Any, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """D34 D35: neither in the frames of its error nor in cycles, before anything waits for its graphs' end."""

    class Graph:
        pass

    def fail(*_: object) -> None:
        graph: Any = Graph()
        graph.itself = graph
        graphs.append(weakref.ref(graph))
        raise ValueError("device must be")

    graphs: list[Any] = []
    monkeypatch.setattr(parts, "make_runner", fail)
    monkeypatch.setattr(uniproc, "ModelRunner", fail)
    monkeypatch.setattr(Ranks, "_release", lambda ranks: parts.calls.append(graphs[0]()))
    gc.disable()
    try:
        with pytest.raises(ValueError, match="device must be"):
            make(parts)
        assert graphs[0]() is None
    finally:
        gc.enable()
    assert parts.calls == (["terminate", "abort", None, "close peers"] if make is Ranks else [])


def test_an_executor_is_closed_with_its_owner_but_not_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """D34 D86."""
    closed: list[str] = []
    monkeypatch.setattr(base, "_start", lambda *_: SimpleNamespace(close=lambda: closed.append("closed")))
    for pid in (1, 2):
        owner = Parts()
        monkeypatch.setattr(base.os, "getpid", lambda: 1)
        make_executor(None, None, None, owner)  # type: ignore[arg-type]
        monkeypatch.setattr(base.os, "getpid", lambda pid=pid: pid)
        del owner
        assert closed == ["closed"]


def test_the_frames_of_an_error_and_of_those_it_followed_from_are_freed() -> None:
    """What failed first, far inside, holds the activations of the step."""
    held: list[weakref.ref[torch.Tensor]] = []

    def compute() -> None:
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        raise RuntimeError("the collective was aborted")

    def step() -> None:
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        try:
            compute()
        except RuntimeError:
            raise ValueError("the step failed")  # noqa: B904  chained as Python does it

    with pytest.raises(ValueError, match="the step failed") as caught:
        step()
    kept = caught.value
    kept.__context__.__context__ = kept  # type: ignore[union-attr]  a ring, which `raise` may leave
    assert all(reference() is not None for reference in held)
    free_frames(kept)
    assert [reference() for reference in held] == [None, None]
