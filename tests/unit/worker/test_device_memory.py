"""Where the figures come from that size the KV cache on a GPU: torch, asked about the runner's own device."""

import ast
from types import SimpleNamespace

import pytest
import torch

from nanovllm import Config
from nanovllm.worker.model_runner import ModelRunner
from tests.support.source_tree import ROOT, imported_packages, parse, python_files

GIB = 2**30


@pytest.mark.parametrize(("num_ranks_per_device", "graph_bytes"), [(1, 0), (1, GIB // 2), (2, GIB // 4)])
def test_memory_is_asked_of_the_runners_own_device(
    monkeypatch: pytest.MonkeyPatch, num_ranks_per_device: int, graph_bytes: int
) -> None:
    """D45: by torch's number, which CUDA_VISIBLE_DEVICES has translated already; not the machine's first GPU.

    Each of the ranks that share it needs blocks, graphs and room for a step.
    """
    device = torch.device("cuda", 3)
    free_and_total = {device: (14 * GIB, 16 * GIB)}
    peak_and_current = {device: {"allocated_bytes.all.peak": 2 * GIB, "allocated_bytes.all.current": 1 * GIB}}
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_stats", peak_and_current.__getitem__)
    runner = object.__new__(ModelRunner)  # a whole one needs the GPU
    runner.device, runner.dtype, runner.config = device, torch.bfloat16, Config("any", gpu_memory_utilization=0.5)
    runner.model_config = SimpleNamespace(num_hidden_layers=1, head_dim=1024)  # type: ignore
    runner.num_kv_heads, runner.num_ranks_per_device = 1, num_ranks_per_device
    bytes_per_block = num_ranks_per_device * 2 * 256 * 1024 * 2
    free_bytes = 8 * GIB - 2 * GIB - num_ranks_per_device * (graph_bytes + 1 * GIB)  # of the share; less what is used
    assert runner._num_blocks_that_fit(graph_bytes) == free_bytes // bytes_per_block


def test_nothing_reads_cuda_visible_devices_or_asks_the_driver_itself() -> None:
    """D45: it may hold UUIDs or anything else; only torch interprets it."""
    files = python_files("nanovllm")
    readers = [
        path.relative_to(ROOT)
        for path in files
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and node.value == "CUDA_VISIBLE_DEVICES"
    ]
    drivers = [path.relative_to(ROOT) for path in files if "pynvml" in imported_packages(path)]
    assert not readers + drivers
