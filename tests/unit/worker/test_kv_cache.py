"""kv_cache: the number of blocks by hand, its errors, and where a ModelRunner reads the memory of a GPU."""

import ast
import re
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nanovllm import Config, bundled_model_path
from nanovllm.distributed.tensor_parallel import SINGLE_RANK
from nanovllm.models.registry import load_model_config
from nanovllm.worker.cuda_graph import GraphSizes
from nanovllm.worker.kv_cache import empty_cache, num_blocks_on_cpu, num_blocks_that_fit
from nanovllm.worker.model_runner import DRIVER_BYTES_PER_GRAPH, ModelRunner
from tests.support.source_tree import ROOT, imported_packages, parse, python_files

GIB = 2**30


@pytest.mark.parametrize(("used", "num_blocks"), [(300, 55), (291, 55), (290, 56), (840, 1)])
def test_blocks_fill_what_the_share_leaves_beside_a_step(used: int, num_blocks: int) -> None:
    """used 300: (1000 * 0.9 - 300 - 50) / 10 = 55; 559 bytes hold no more blocks than 550."""
    assert num_blocks_that_fit(1000, 0.9, used, step_bytes=50, bytes_per_block=10) == num_blocks


def test_memory_of_another_process_is_an_error_with_the_figures() -> None:
    """D43: 80 GiB at 0.9 with 75 GiB taken is less than nothing."""
    message = (
        "gpu_memory_utilization must leave room for at least one KV block of 0.500 GiB, got 0.9 of 80.00 GiB: "
        "75.00 GiB are in use (other processes included) and a step needs 2.00 GiB more; set it to at least 0.969, "
        "free the GPU, or lower max_num_batched_tokens, max_num_seqs or max_model_len"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        num_blocks_that_fit(80 * GIB, 0.9, used=75 * GIB, step_bytes=2 * GIB, bytes_per_block=GIB // 2)


@pytest.mark.parametrize(
    ("used", "remedy"),
    [(841, "set it to at least 0.901, free"), (940, "set it to at least 1.0, free"), (941, "free")],
)
def test_a_byte_less_than_one_block_is_an_error_and_the_share_is_raised_to_the_whole_gpu_at_most(
    used: int, remedy: str
) -> None:
    with pytest.raises(ValueError, match=f"GiB more; {remedy} the GPU, or lower max_num_batched_tokens"):
        num_blocks_that_fit(1000, 0.9, used, step_bytes=50, bytes_per_block=10)


@pytest.mark.parametrize(
    ("available", "max_num_seqs", "max_blocks_per_seq", "num_blocks"),
    [(4039, 512, 16, 100), (4040, 512, 16, 101), (4000, 3, 4, 12), (40, 512, 16, 1)],
)
def test_a_quarter_of_memory_but_no_more_than_all_sequences_can_use(
    available: int, max_num_seqs: int, max_blocks_per_seq: int, num_blocks: int
) -> None:
    assert num_blocks_on_cpu(available, 10, max_num_seqs, max_blocks_per_seq) == num_blocks


@pytest.mark.parametrize(
    ("is_given", "remedy"),
    [(True, "lower it, or leave it out to size the cache from free memory"), (False, "set it to fewer")],
)
def test_a_cache_beyond_the_machines_memory_is_an_error_with_its_size(
    is_given: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux would grant it, and kill the process later."""
    shape = (2, 1, 4, 16, 1, 8)
    memory = SimpleNamespace(total=4096)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    cache = empty_cache(shape, torch.float32, torch.device("cpu"), is_given)
    assert (cache.shape, cache.dtype) == (shape, torch.float32)
    memory.total = 4095
    message = f"num_kv_cache_blocks must fit in the memory of cpu, got 4, which take 3.815e-06 GiB; {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        empty_cache(shape, torch.float32, torch.device("cpu"), is_given)


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
    runner = object.__new__(ModelRunner)  # its constructor needs the GPU
    runner.device, runner.dtype, runner.config = device, torch.bfloat16, Config("any", gpu_memory_utilization=0.5)
    runner.model_config = SimpleNamespace(num_hidden_layers=3, head_dim=1024)  # type: ignore
    runner.num_kv_heads, runner.num_ranks_per_device = 5, num_ranks_per_device
    runner.block_size = 256
    bytes_per_block = num_ranks_per_device * 2 * 3 * 256 * 5 * 1024 * 2  # the last 2: of bfloat16
    free_bytes = 8 * GIB - 2 * GIB - num_ranks_per_device * (graph_bytes + 1 * GIB)  # of the share; less what is used
    assert runner._num_blocks_that_fit(graph_bytes) == free_bytes // bytes_per_block


def test_nothing_reads_cuda_visible_devices_or_asks_the_driver_itself() -> None:
    """D45: the variable may hold UUIDs or anything else; only torch interprets it."""
    for path in python_files("nanovllm"):
        values = [node.value for node in ast.walk(parse(path)) if isinstance(node, ast.Constant)]
        assert "CUDA_VISIBLE_DEVICES" not in values, path.relative_to(ROOT)
        assert "pynvml" not in imported_packages(path), path.relative_to(ROOT)


@pytest.mark.parametrize(
    ("options", "defaults_of_ranks", "expected"),
    [
        ({}, [64, 64], 64),
        ({}, [64, 256], 256),  # GPUs of two kinds: 256 serves both
        ({"kv_cache_block_size": 16}, [64, 256], 16),
        ({"num_kv_cache_blocks": 9}, [64, 64], 256),  # counted in nano-vllm's blocks
    ],
)
def test_the_block_size_is_the_users_or_serves_all_ranks(
    options: dict[str, int], defaults_of_ranks: list[int], expected: int
) -> None:
    runner: Any = object.__new__(ModelRunner)
    runner.config = Config("any", attention_backend="triton", **options)  # type: ignore[arg-type]
    runner.tp = SimpleNamespace(all_reduce_min=lambda value: min(value, -defaults_of_ranks[1]))
    runner.ops = SimpleNamespace(attention=SimpleNamespace(default_block_size=defaults_of_ranks[0]))
    assert runner._choose_block_size() == expected


@pytest.mark.parametrize(("shares_prefixes", "num_graphs"), [(False, 20 + 10), (True, 24 + 10)])
def test_the_drivers_memory_of_every_graph_counts(
    shares_prefixes: bool, num_graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, 2, 4, 8, the multiples of 16 to 240, and 256 sequences; for a shared prefix also 64, 128, 192 and 256; for
    prefill all sizes, since the model is small.
    """
    runner: Any = object.__new__(ModelRunner)
    runner.device, runner.config = torch.device("cuda:0"), Config("any", max_num_seqs=256)
    runner.model_config, runner.tp = load_model_config(bundled_model_path()), SINGLE_RANK
    runner.shares_prefixes = shares_prefixes
    runner.allocate_kv_cache = lambda num_blocks: None
    runner.graph_sizes = runner._choose_graph_sizes()
    closed: list[str] = []

    def capture_graphs(sizes: GraphSizes, use_tqdm: bool) -> None:
        assert sizes == ([256], [256] * shares_prefixes, [4096]), "the largest of each kind"
        runner.graphs = SimpleNamespace(close=lambda: closed.append("decode"))
        runner.prefill_graphs = SimpleNamespace(close=lambda: closed.append("prefill"))

    runner.capture_graphs = capture_graphs
    free = iter([(1000, 2000), (400, 2000)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: next(free))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    assert runner._measure_graph_bytes() == 600 + num_graphs * DRIVER_BYTES_PER_GRAPH
    assert closed == ["decode", "prefill"]
    assert runner.graphs is runner.prefill_graphs is None
