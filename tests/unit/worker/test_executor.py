"""Executor with stand-ins for the runner and the ranks: what it asks of them, in which order, and what it raises."""

import gc
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from nanovllm import Config
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.model_config import ModelConfig
from nanovllm.worker import executor
from nanovllm.worker.process_group import Place

BATCH = cast(ScheduledBatch, "a batch")
MODEL_CONFIG = cast(ModelConfig, None)


class Parts:
    """A runner and ranks that write down what they are asked, and raise what `fails` has under that name."""

    place = Place(0, 2, num_sharing=2)
    num_kv_cache_blocks = 1
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.cause: BaseException | None = None
        self.is_broken = False

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fails:
            raise self.fails[call]

    def connect(self) -> str:
        return "the group"

    def send(self, batch: object) -> None:
        self.note(f"send {batch}")

    def run(self, batch: object) -> list[int]:
        self.note(f"run {batch}")
        return [7]

    def check(self) -> None:
        self.note("check")

    def explain(self, error: BaseException) -> BaseException:
        self.note("explain")
        return self.cause or error

    def break_off(self) -> None:
        self.note("break off")
        self.is_broken = True

    def say_end(self) -> None:
        self.note("say end")

    def close(self) -> None:
        self.note("close")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    parts = Parts()
    monkeypatch.setattr(executor, "ModelRunner", lambda *_: parts)
    monkeypatch.setattr(executor, "_other_ranks", lambda _: parts)
    monkeypatch.setattr(executor, "leave", lambda tp: parts.note(f"leave {tp}"))
    return parts


def make_executor(size: int = 2) -> Any:
    return executor.Executor(Config("any", tensor_parallel_size=size), MODEL_CONFIG, Path("any"))


def test_a_step_is_sent_computed_and_checked(parts: Parts) -> None:
    ranks = make_executor()
    assert ranks.run(BATCH) == [7]
    assert parts.calls == ["send a batch", "run a batch", "check"]
    ranks.close()
    assert parts.calls[3:] == ["say end", "close", "leave the group", "close"]  # runner, then ranks


def test_one_rank_asks_nobody(parts: Parts) -> None:
    alone = make_executor(size=1)
    assert alone.run(BATCH) == [7]
    alone.close()
    assert parts.calls == ["run a batch", "close"]


@pytest.mark.parametrize(
    ("device", "size", "supports_async_scheduling"), [("cpu", 1, False), ("cuda", 1, True), ("cuda", 2, False)]
)
def test_one_rank_on_a_gpu_can_go_ahead(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, device: str, size: int, supports_async_scheduling: bool
) -> None:
    monkeypatch.setattr(parts, "device", torch.device(device))
    assert make_executor(size).supports_async_scheduling is supports_async_scheduling


@pytest.mark.parametrize("where", ["send a batch", "run a batch", "check"])
@pytest.mark.parametrize("error", [RuntimeError("the connection closed"), KeyboardInterrupt()])
def test_whatever_fails_in_a_step_ends_the_executor(parts: Parts, where: str, error: BaseException) -> None:
    """D33: Ctrl-C too. The ranks are broken off before anything waits for them."""
    ranks = make_executor()
    parts.fails[where] = error
    with pytest.raises(type(error)) as caught:
        ranks.run(BATCH)
    assert caught.value is error
    end = ["explain", "break off", "say end", "close", "close"]  # a group that others have left is not left in order
    assert parts.calls[parts.calls.index("explain") :] == end
    assert ranks.is_closed
    with pytest.raises(RuntimeError, match="the ranks of this engine have ended: make a new one"):
        ranks.run(BATCH)
    assert parts.calls[-1] == "close", "nothing is asked of them any more"


def test_the_cause_is_raised_from_what_rank_0_ran_into(parts: Parts) -> None:
    """D33."""
    ranks = make_executor()
    noticed, parts.cause = RuntimeError("the connection closed"), RuntimeError("rank 1 of 2 failed")
    parts.fails["run a batch"] = noticed
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed") as caught:
        ranks.run(BATCH)
    assert caught.value.__cause__ is noticed


def test_a_runner_that_cannot_start_leaves_nothing(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """D34 D35: neither in the frames of its error nor in cycles, before anything waits for its graphs' end."""

    class Graph:
        pass

    def fail(*_: object) -> None:
        graph: Any = Graph()
        graph.itself = graph
        graphs.append(weakref.ref(graph))
        raise ValueError("device must be")

    graphs: list[Any] = []
    left: list[Any] = []
    monkeypatch.setattr(executor, "ModelRunner", fail)
    monkeypatch.setattr(parts, "close", lambda: left.append(graphs[0]()))
    gc.disable()
    try:
        with pytest.raises(ValueError, match="device must be"):
            make_executor()
    finally:
        gc.enable()
    assert parts.calls == ["explain", "break off"]
    assert left == [None]
