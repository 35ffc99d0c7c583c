"""D97: how many threads an engine takes on the CPU, and how they wait."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.models.registry import load_model_config
from nanovllm.omp_wait_policy import passive_omp_wait
from nanovllm.worker import cpu_threads
from nanovllm.worker.cpu_threads import (
    choose_num_threads,
    cpu_quota,
    mean_layer_parameters,
    num_threads_for,
    physical_cores,
    torch_threads,
    user_has_chosen,
)
from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT
from tests.support.tiny_models import tiny_model

BUNDLED = load_model_config(bundled_model_path())


@pytest.mark.parametrize(
    ("cores", "millions", "num_ranks", "number"),
    [
        (16, 0.2, 1, 1),  # a small model
        (16, 3.4, 1, 3),
        (16, 100, 1, 16),
        (1, 100, 1, 1),
        (16, 100, 4, 4),  # ranks divide the cores,
        (16, 8, 4, 2),  # and the layers
        (2, 100, 4, 1),  # more ranks than cores
    ],
)
def test_threads_follow_from_cores_model_and_ranks(cores: int, millions: float, num_ranks: int, number: int) -> None:
    """D97"""
    assert num_threads_for(cores, millions * 1e6, num_ranks) == number


@pytest.mark.parametrize(
    ("environment", "is_chosen"),
    [
        ({}, False),
        ({"OMP_NUM_THREADS": "4"}, True),
        ({"MKL_NUM_THREADS": "4"}, True),
        ({"OMP_NUM_THREADS": " "}, False),
        ({"OMP_WAIT_POLICY": "passive"}, False),
    ],
)
def test_the_users_number_of_threads_is_left_alone(
    environment: dict[str, str], is_chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D97"""
    assert user_has_chosen(environment) is is_chosen
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (choose_num_threads(BUNDLED) is None) is is_chosen


@pytest.mark.parametrize(
    ("architecture", "options"), [("llama", {}), ("qwen3", {"num_heads": 8}), ("qwen3_moe", {"num_heads": 4})]
)
def test_parameters_of_a_layer_are_those_of_the_model(architecture: str, options: dict[str, Any]) -> None:
    """D97: the matrices of a random model, counted; of the experts those that one token meets."""
    path = tiny_model(architecture, **options)
    config = load_model_config(path)
    with LLM(str(path), device="cpu", num_kv_cache_blocks=2, max_model_len=64) as llm:
        model = llm._core.executor._runner.model
        total = sum(
            parameter.numel() * _share_of_token(name, config)
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and "norm" not in name and "embed_tokens" not in name and "gate.weight" not in name
        )
    total += 0 if not config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert mean_layer_parameters(config) == pytest.approx(total / (config.num_hidden_layers + 1))


def _share_of_token(name: str, config: Any) -> float:
    return config.moe.num_experts_per_tok / config.moe.num_experts if config.moe and "expert" in name else 1.0


# --- cores ---


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_hyper_threads_of_one_core_count_once(tmp_path: Path) -> None:
    """D97: four logical CPUs on two cores, and a fifth of which Linux says nothing."""
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path, **{f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": siblings + "\n"})
    assert physical_cores([0, 1, 2, 3], tmp_path) == 2
    assert physical_cores([0, 2], tmp_path) == 1
    assert physical_cores([0, 4], tmp_path) == 2


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),  # the parent's limit holds too
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 100000"}, 1.0),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "400000 100000"}, 1.0),
        ("0::/../host/path", {"cpu.max": "300000 100000"}, 3.0),
        (
            "4:cpu,cpuacct:/docker/7f\n3:memory:/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/", {"memory/cpu.cfs_quota_us": "100000", "memory/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {"cpu.max": "what"}, None),
    ],
)
def test_the_quota_of_a_container_is_read(cgroup: str, files: dict[str, str], quota: float, tmp_path: Path) -> None:
    """D97: cgroup v2 and v1, with the path of the container or of its host."""
    write(tmp_path, **{"proc/self/cgroup": cgroup + "\n"})
    write(tmp_path, **{f"sys/fs/cgroup/{name}": text + "\n" for name, text in files.items()})
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (2.7, 2), (0.5, 1), (9.0, 4)])
def test_cores_are_those_of_the_affinity_within_the_quota(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D97"""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(100, 104), raising=False)
    monkeypatch.setattr(cpu_threads, "physical_cores", lambda cpus: len(cpus))
    monkeypatch.setattr(cpu_threads, "cpu_quota", lambda: quota)
    assert cpu_threads.available_cores() == cores


@pytest.mark.parametrize(
    ("cores", "parameters", "num_ranks", "text"),
    [
        (2, 2e5, 1, "CPU threads: 1 of 2 cores (small model)"),
        (8, 9e6, 1, "CPU threads: 8 of 8 cores (all that are available)"),
        (8, 9e6, 4, "CPU threads: 2 of 8 cores (4 ranks)"),
    ],
)
def test_the_choice_is_logged(
    cores: int, parameters: float, num_ranks: int, text: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """D97"""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_threads, "available_cores", lambda: cores)
    monkeypatch.setattr(cpu_threads, "mean_layer_parameters", lambda model: parameters)
    caplog.set_level(logging.INFO, "nanovllm")
    choose_num_threads(BUNDLED, num_ranks)
    assert caplog.messages == [text]


# --- torch ---


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_an_engine_sets_torchs_threads_for_its_steps_alone(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D97: also when a step fails."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    seen = []
    with LLM(str(bundled_model_path()), device="cpu", num_kv_cache_blocks=4, max_model_len=64) as llm:
        model = llm._core.executor._runner.model
        model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
        llm.generate("In the beginning", SamplingParams.greedy(max_tokens=2), use_tqdm=False)
        assert torch.get_num_threads() == 3
        model.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate("In the beginning", use_tqdm=False)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 3


def test_threads_that_compute_at_once_leave_torchs_number_as_it_was(three_threads: None) -> None:
    """D97: the second thread finds the first one's number, as torch's is the process's, and must not keep it."""
    is_inside, may_leave = threading.Event(), threading.Event()
    numbers = []

    def compute() -> None:
        with torch_threads(2):
            is_inside.set()
            may_leave.wait(HANG_SECONDS)
        numbers.append(torch.get_num_threads())

    with torch_threads(1):
        thread = threading.Thread(target=compute)
        thread.start()
        assert is_inside.wait(HANG_SECONDS)
    may_leave.set()
    thread.join(HANG_SECONDS)
    assert (numbers, torch.get_num_threads()) == ([3], 3)


def test_no_number_changes_nothing(three_threads: None) -> None:
    with torch_threads(None):
        assert torch.get_num_threads() == 3


# --- waiting ---


def test_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """D97"""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    with passive_omp_wait():
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    with passive_omp_wait():
        assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize("first", ["nanovllm.worker.executor", "nanovllm.worker.rank_process", "AutoTokenizer"])
def test_torch_is_imported_with_sleeping_threads(first: str) -> None:
    """D97: whatever imports it first: an engine with a tokenizer, one without, or a rank's process."""
    action = f"import {first}"
    if first == "AutoTokenizer":
        action = "from nanovllm.engine.tokenizer import load_tokenizer; load_tokenizer(nanovllm.bundled_model_path())"
    code = f"""
import os, sys, nanovllm
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Finder())
{action}
assert "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ
"""
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in waiting}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert (result.returncode, result.stdout.split()[:1]) == (0, ["passive"]), result.stderr
