"""D97: the number of threads that an engine takes on the CPU, and how they wait."""

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.model_config import MoEConfig
from nanovllm.models.registry import load_model_config
from nanovllm.omp_wait_policy import passive_omp_wait
from nanovllm.worker import cpu_threads
from nanovllm.worker.cpu_threads import (
    choose_num_threads,
    cpu_quota,
    mean_layer_parameters,
    physical_cores,
    torch_threads,
)
from tests.support.checkpoints import counted_by_hand
from tests.support.limits import HANG_SECONDS
from tests.support.programs import run_python

BUNDLED = load_model_config(bundled_model_path())
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *WAITING):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("cores", "millions", "num_ranks", "number", "reason"),
    [
        (16, 0.2, 1, 1, "small model"),
        (16, 3.4, 1, 3, "small model"),
        (16, 100, 1, 16, "all that are available"),
        (1, 100, 1, 1, "all that are available"),
        (16, 100, 4, 4, "4 ranks"),  # they divide the cores,
        (16, 8, 4, 2, "small model"),  # and the layers
        (2, 100, 4, 1, "4 ranks"),  # more than cores
    ],
)
def test_threads_follow_from_cores_model_and_ranks(
    cores: int, millions: float, num_ranks: int, number: int, reason: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """D97. The choice is logged, with its reason."""
    monkeypatch.setattr(cpu_threads, "available_cores", lambda: cores)
    monkeypatch.setattr(cpu_threads, "mean_layer_parameters", lambda model: millions * 1e6)
    caplog.set_level(logging.INFO, "nanovllm")
    assert choose_num_threads(BUNDLED, num_ranks) == number
    assert caplog.messages == [f"CPU threads: {number} of {cores} cores ({reason})"]


@pytest.mark.parametrize(
    ("name", "value", "is_chosen"),
    [("OMP_NUM_THREADS", "4", True), ("MKL_NUM_THREADS", "4", True), ("OMP_NUM_THREADS", " ", False)],
)
def test_the_users_number_of_threads_is_left_alone(
    name: str, value: str, is_chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D97."""
    monkeypatch.setenv(name, value)
    assert (choose_num_threads(BUNDLED) is None) is is_chosen


def test_the_mean_over_layers_counts_the_output_layer_and_no_routers() -> None:
    """D97. test_parameter_counts.py has the parameters of a layer."""
    dense = counted_by_hand()
    assert mean_layer_parameters(dense) == (1728 + 80) / 4
    moe = MoEConfig(4, 2, moe_intermediate_size=5, norm_topk_prob=True, layers=frozenset({1, 2}))
    attention, dense_layer, expert = 3 * 192, 384, 3 * 8 * 5
    assert mean_layer_parameters(replace(dense, moe=moe)) == (attention + dense_layer + 2 * 2 * expert + 80) / 4


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def v1(controllers: str, quota: int) -> dict[str, str]:
    return {f"{controllers}/cpu.cfs_quota_us": str(quota), f"{controllers}/cpu.cfs_period_us": "100000"}


def test_hyper_threads_of_one_core_count_once(tmp_path: Path) -> None:
    """D97: four logical CPUs on two cores; Linux does not list the siblings of a fifth."""
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
    assert physical_cores([0, 1, 2, 3], tmp_path) == 2
    assert physical_cores([0, 2], tmp_path) == 1
    assert physical_cores([0, 4], tmp_path) == 2


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "what"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),  # the parent's limit holds too
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 100000"}, 1.0),
        ("0::/../host/path", {"cpu.max": "300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/docker/7f\n3:memory:/", v1("cpu,cpuacct", 250000), 2.5),
        ("4:cpu,cpuacct:/", v1("cpu", 50000), 0.5),
        ("4:cpu:/", v1("cpu", -1), None),
        ("4:memory:/", v1("memory", 100000), None),
    ],
)
def test_the_quota_of_a_container_is_read(
    cgroup: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    """D97: cgroup v2 and v1, with the path of the container or of its host."""
    write(tmp_path / "proc/self/cgroup", cgroup)
    for name, text in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (2.7, 2), (0.5, 1), (9.0, 4)])
def test_cores_are_those_of_the_affinity_within_the_quota(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(100, 104), raising=False)
    monkeypatch.setattr(cpu_threads, "physical_cores", lambda cpus: len(cpus))
    monkeypatch.setattr(cpu_threads, "cpu_quota", lambda: quota)
    assert cpu_threads.available_cores() == cores


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_an_engine_sets_torchs_threads_for_its_steps_alone() -> None:
    """D97: also if a step fails."""
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


@pytest.mark.usefixtures("three_threads")
def test_threads_that_compute_at_once_leave_torchs_number_as_it_was() -> None:
    """D97: torch's number is the process's, so the second thread finds the first one's, and must not keep it."""
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


def test_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """D97."""
    with passive_omp_wait():
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    with passive_omp_wait():
        assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    "action",
    [
        "nanovllm.LLM(str(nanovllm.bundled_model_path()), device='cpu', num_kv_cache_blocks=2).close()",
        "import nanovllm.executor.worker_main",
        "from nanovllm.engine.tokenizer import load_tokenizer; load_tokenizer(nanovllm.bundled_model_path())",
    ],
)
def test_torch_is_imported_with_sleeping_threads(action: str) -> None:
    """D97: whatever imports it first: an engine without a tokenizer, the process of a rank, or a tokenizer."""
    code = f"""
import os, sys, nanovllm
class Finder:
    def find_spec(self, name, *rest):
        if name.startswith("torch."):  # of torch's own imports; transformers looks for "torch" before it imports it
            print(os.environ.get("OMP_WAIT_POLICY"))
            raise SystemExit  # the whole import would take seconds
sys.meta_path.insert(0, Finder())
try:
    {action}
except SystemExit:
    print(os.environ.get("OMP_WAIT_POLICY"))
"""
    result = run_python("-c", code)
    assert result.stdout.split() == ["passive", "None"], result.stderr
