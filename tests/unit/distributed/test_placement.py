"""Where ranks compute, without GPUs: which GPU, how many ranks use it, and what torchrun's environment says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.distributed.placement import RankPlacement, local_placements, torchrun_placement
from nanovllm.distributed.process_group import init_process_group
from nanovllm.torchrun_env import TorchrunEnv, read_torchrun_env

ENVIRONMENT = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def test_ranks_on_a_cpu_use_the_same_memory() -> None:
    placements = local_placements(torch.device("cpu"), 3)
    assert placements == [RankPlacement(rank, 3, num_ranks_per_device=3, gpu=None) for rank in range(3)]
    assert not any(placement.has_own_gpu for placement in placements)


@pytest.mark.parametrize(
    ("num_gpus", "first", "size", "expected", "per_device"),
    [
        (8, 0, 4, [0, 1, 2, 3], 1),
        (8, 6, 4, [6, 7, 0, 1], 1),
        (1, 0, 2, [0, 0], 2),
        (2, 0, 4, [0, 1, 0, 1], 2),
        (3, 0, 4, [0, 1, 2, 0], 2),
    ],
)
def test_gpus_are_assigned_in_turn_from_rank_0s_on(monkeypatch, num_gpus, first, size, expected, per_device) -> None:
    """NCCL needs a GPU for each rank; with fewer GPUs, no rank counts on one of its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    placements = local_placements(torch.device("cuda", first), size)
    assert [placement.gpu for placement in placements] == expected
    assert {placement.num_ranks_per_device for placement in placements} == {per_device}
    assert all(placement.has_own_gpu == (per_device == 1) for placement in placements)


def test_under_torchrun_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """D35: without asking for the current GPU, which is the first on every rank until then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("initializes CUDA on GPU 0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torchrun_placement("cuda", TorchrunEnv(5, 8, 1, 2)) == RankPlacement(5, 8, num_ranks_per_device=1, gpu=1)
    assert torchrun_placement("auto", TorchrunEnv(4, 8, 3, 4)) == RankPlacement(4, 8, num_ranks_per_device=2, gpu=1)
    assert torchrun_placement("cpu", TorchrunEnv(5, 8, 1, 2)) == RankPlacement(5, 8, num_ranks_per_device=2)


@pytest.mark.parametrize("change", [{}, {"WORLD_SIZE": "1"}, *({name: None} for name in ENVIRONMENT)])
def test_the_rank_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    """Some clusters set RANK, or WORLD_SIZE=1, for every program."""
    for name, value in {**ENVIRONMENT, **change}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert read_torchrun_env() == (None if change else TorchrunEnv(3, 8, 1, 2))


def test_a_rank_sets_its_device_before_it_makes_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """D35: a group made before that holds GPU 0 on every rank."""
    calls: list[object] = []
    group = SimpleNamespace(name=lambda: "gloo", allreduce=lambda *_: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    placement = RankPlacement(0, 2, num_ranks_per_device=1, gpu=1)
    init_process_group(placement, None, lambda *_: calls.append("group") or group)
    assert calls == [1, "group"]
