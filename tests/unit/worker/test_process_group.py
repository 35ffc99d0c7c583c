"""Where ranks compute, worked out without GPUs: which GPU, who shares it, and so which backend."""

from typing import Any

import pytest
import torch

from nanovllm import Config
from nanovllm.torchrun import Launch, read_launch
from nanovllm.worker import executor, process_group, rank_process
from nanovllm.worker.process_group import Place, launched_place, local_places

ENVIRONMENT = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_ranks_on_a_cpu_share_its_memory() -> None:
    places = local_places(torch.device("cpu"), 3)
    assert places == [Place(rank, 3, num_sharing=3, gpu=None) for rank in range(3)]
    assert not any(place.has_own_gpu for place in places)


@pytest.mark.parametrize(
    ("num_gpus", "first", "size", "expected", "num_sharing"),
    [
        (8, 0, 4, [0, 1, 2, 3], 1),
        (8, 6, 4, [6, 7, 0, 1], 1),
        (1, 0, 2, [0, 0], 2),
        (2, 0, 4, [0, 1, 0, 1], 2),
        (3, 0, 4, [0, 1, 2, 0], 2),
    ],
)
def test_ranks_take_gpus_from_rank_0s_on(gpus, num_gpus, first, size, expected, num_sharing) -> None:
    """NCCL needs a GPU for each rank; with fewer GPUs, no rank counts on one of its own."""
    gpus(num_gpus)
    places = local_places(torch.device("cuda", first), size)
    assert [place.gpu for place in places] == expected
    assert {place.num_sharing for place in places} == {num_sharing}
    assert all(place.has_own_gpu == (num_sharing == 1) for place in places)


def test_a_launched_rank_takes_the_gpu_of_its_local_rank(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """D35: without a look at the current GPU, which is the first on every rank until then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("touches GPU 0"))
    gpus(2)
    assert launched_place("cuda", Launch(5, 8, 1, 2)) == Place(5, 8, num_sharing=1, gpu=1)
    assert launched_place("auto", Launch(4, 8, 3, 4)) == Place(4, 8, num_sharing=2, gpu=1)
    assert launched_place("cpu", Launch(5, 8, 1, 2)) == Place(5, 8, num_sharing=2)


def test_a_launch_is_read_off_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch(3, 8, 1, 2)


@pytest.mark.parametrize("missing", [*ENVIRONMENT, "several"])
def test_a_lone_process_is_no_launch(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Some clusters set RANK or WORLD_SIZE=1 for every program."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    if missing == "several":
        monkeypatch.setenv("WORLD_SIZE", "1")
    else:
        monkeypatch.delenv(missing)
    assert read_launch() is None


def test_a_rank_enters_its_device_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """D35: a group made before that holds GPU 0 on every rank."""
    calls: list[object] = []

    class Group:
        def name(self) -> str:
            return "gloo"

        def allreduce(self, *_: object) -> "Group":
            return self

        def wait(self) -> None:
            pass

    def make_group(*_: object) -> Group:
        calls.append("group")
        return Group()

    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    process_group.join(Place(0, 2, num_sharing=1, gpu=1), None, make_group)
    assert calls == [1, "group"]


def test_every_rank_frees_its_runner_before_it_leaves_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """D35: the runner's graphs hold collectives of the group. Rank 0 asks the others to end before it does so itself,
    since an end of NCCL's may wait for theirs.
    """
    calls: list[str] = []

    class Runner:
        num_kv_cache_blocks = 1
        device = torch.device("cpu")

        def __init__(self, *_: object) -> None:
            calls.append("load")

        def run(self, batch: object) -> None:
            calls.append(f"run {batch}")

        def close(self) -> None:
            calls.append("free")

    class Ranks:
        place = Place(0, 2, num_sharing=2)
        is_broken = False
        connect = check = staticmethod(lambda: None)
        say_end = staticmethod(lambda: calls.append("say end"))
        close = staticmethod(lambda: calls.append("wait for the others"))

    for module in (rank_process, executor):
        monkeypatch.setattr(module, "ModelRunner", Runner)
        monkeypatch.setattr(module, "leave", lambda *_: calls.append("leave"))
    monkeypatch.setattr(executor, "_other_ranks", lambda _: Ranks())
    messages = iter(["a", "b", None])
    model: Any = rank_process.Model(Config("any", tensor_parallel_size=2), None, None)  # type: ignore[arg-type]
    rank_process.serve(model, Place(1, 2, num_sharing=2), None, messages.__next__)  # type: ignore[arg-type]
    assert calls == ["load", "run a", "run b", "free", "leave"]
    calls.clear()
    rank_0 = executor.Executor(model.config, model.model_config, model.model_dir)
    rank_0.close()
    rank_0.close()
    assert calls == ["load", "say end", "free", "leave", "wait for the others"]
