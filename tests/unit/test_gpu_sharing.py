"""How the GPU tests share a GPU: who runs beside whom, and in how many processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tests.support.gpu_sharing import (
    gpus_needed_by,
    held,
    pytest_cmdline_main,
    pytest_collection_modifyitems,
    pytest_runtest_setup,
)
from tests.support.limits import HANG_SECONDS
from tests.support.skips import Skip, why
from tests.support.source_tree import ROOT

SHORT = 0.2  # seconds, in which a thread that may not come does not


class Visitor(threading.Thread):
    """Takes the lock, says so, and keeps it until it is sent away."""

    def __init__(self, folder: Path, exclusively: bool, slot: int = 0) -> None:
        super().__init__(daemon=True)
        self.folder, self.exclusively, self.slot = folder, exclusively, slot
        self.is_in, self.may_go = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with held(self.folder, self.exclusively, self.slot):
            self.is_in.set()
            self.may_go.wait(HANG_SECONDS)

    def leave(self) -> None:
        self.may_go.set()
        self.join(HANG_SECONDS)


def test_sharers_run_side_by_side(tmp_path: Path) -> None:
    visitors = [Visitor(tmp_path, exclusively=False, slot=slot) for slot in range(3)]
    assert all(visitor.is_in.wait(HANG_SECONDS) for visitor in visitors)
    for visitor in visitors:
        visitor.leave()


def test_who_wants_the_whole_gpu_is_alone_and_is_not_overtaken(tmp_path: Path) -> None:
    sharer = Visitor(tmp_path, exclusively=False)
    assert sharer.is_in.wait(HANG_SECONDS)
    alone = Visitor(tmp_path, exclusively=True)
    assert not alone.is_in.wait(SHORT)
    latecomer = Visitor(tmp_path, exclusively=False)
    assert not latecomer.is_in.wait(SHORT)
    sharer.leave()
    assert alone.is_in.wait(HANG_SECONDS)
    assert not latecomer.is_in.is_set()
    alone.leave()
    assert latecomer.is_in.wait(HANG_SECONDS)
    latecomer.leave()


def test_a_failure_lets_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path, exclusively=True):
        raise RuntimeError
    visitor = Visitor(tmp_path, exclusively=True)
    assert visitor.is_in.wait(HANG_SECONDS)
    visitor.leave()


def workers(**options: Any) -> Any:
    """The number of processes that the plugin asks xdist for."""
    defaults = {"markexpr": "gpu", "numprocesses": None, "usepdb": False, "collectonly": False, "dist": "no"}
    arguments = options.pop("arguments", ["tests"])
    config: Any = SimpleNamespace(option=SimpleNamespace(**{**defaults, **options}), args=arguments)
    pytest_cmdline_main(config)
    return config.option.numprocesses


@pytest.mark.parametrize(
    ("markexpr", "needed"),
    [
        ("gpu", {1}),
        ("gpu and not whole_gpu", {1}),
        ("whole_gpu", {1}),
        ("not (not gpu)", {1}),
        ("gpu and campaign", {1}),
        ("multi_gpu", {2}),
        ("gpu or multi_gpu", {1, 2}),
        ("gpu or campaign", {0, 1, 2}),  # a campaign may need several
        ("not gpu", {0, 2}),
        ("not gpu and not multi_gpu and not campaign", {0}),
        ("campaign", {0, 1, 2}),
        ("", {0, 1, 2}),
        ("gpu and", {0}),  # pytest refuses it
        ("gpu and not gpu", {0}),  # selects nothing
    ],
)
def test_what_a_run_needs_follows_from_the_meaning_of_its_markers(markexpr: str, needed: set[int]) -> None:
    assert gpus_needed_by(markexpr) == needed


@pytest.mark.parametrize(
    ("markexpr", "what"),
    [
        ("gpu", "need an NVIDIA GPU"),
        ("gpu and not whole_gpu", "need an NVIDIA GPU"),
        ("multi_gpu", "need several NVIDIA GPUs"),
    ],
)
def test_without_a_gpu_the_run_says_so(markexpr: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.gpu_sharing.num_gpus", lambda: 0)
    with pytest.raises(pytest.UsageError, match=what):
        workers(markexpr=markexpr)
    assert workers(markexpr=f"not ({markexpr})") is None
    assert workers(markexpr=markexpr, collectonly=True) is None


@pytest.mark.parametrize("markexpr", ["multi_gpu", "gpu and not whole_gpu"])
def test_without_a_gpu_the_run_is_one_line(markexpr: str) -> None:
    """A run of its own, with the exit code of a wrong option."""
    command = [sys.executable, "-m", "pytest", "-m", markexpr]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (pytest.ExitCode.USAGE_ERROR, "")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"ERROR: -m '{markexpr}': these tests need ")


def test_a_test_that_needs_more_gpus_than_there_are_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """multi_gpu alone needs two; others say how many; tests for one GPU are not asked."""
    items = {number: MarkedItem(numbers) for number, numbers in ((0, None), (2, ()), (4, (4,)))}
    for there, skipped in ((1, {2, 4}), (2, {4}), (4, set())):
        monkeypatch.setattr("tests.support.gpu_sharing.num_gpus", lambda there=there: there)
        for number, item in items.items():
            if number not in skipped:
                pytest_runtest_setup(item)  # type: ignore[arg-type]
                continue
            with pytest.raises(pytest.skip.Exception, match=f"needs {number} GPUs, there are {there}"):
                pytest_runtest_setup(item)  # type: ignore[arg-type]


def test_the_skips_of_few_gpus_are_stated() -> None:
    name = "tests/distributed/test_gpu_ranks.py::test_a_rank_that_fails_over_nccl[raise-decode]"
    assert why(Skip(name, "needs 2 GPUs, there are 1"))
    assert not why(Skip(name, "out of memory"))


class MarkedItem(NamedTuple):
    """numbers: the arguments of its marker multi_gpu, None if it has no such marker."""

    numbers: tuple[int, ...] | None

    def iter_markers(self, name: str) -> list[Any]:
        assert name == "multi_gpu"
        return [] if self.numbers is None else [SimpleNamespace(args=self.numbers)]


def test_only_a_run_of_gpu_tests_gets_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.gpu_sharing.num_gpus", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert workers() == 8
    assert workers(markexpr="gpu and not whole_gpu") == 8
    assert workers(numprocesses=0) == 0
    assert workers(numprocesses=3) == 3
    assert workers(markexpr="not gpu") is None
    assert workers(markexpr="multi_gpu") is None
    assert workers(usepdb=True) is None
    assert workers(collectonly=True) is None
    assert workers(arguments=["tests/e2e/test_gpu.py::test_close_gives_gpu_memory_back"]) is None
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert workers() == 2


def test_the_processes_start_no_processes(tmp_path: Path) -> None:
    """A run of its own, in which every test says who runs it."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  whole_gpu\n")
    (tmp_path / "conftest.py").write_text(
        "import os, tests.support.gpu_sharing\n"
        "os.cpu_count = lambda: 4\n"
        "tests.support.gpu_sharing.num_gpus = lambda: 1\n"
        "pytest_plugins = ['tests.support.gpu_sharing']\n"
    )
    (tmp_path / "test_who.py").write_text(
        "import os, pathlib, pytest\n"
        "@pytest.mark.gpu\n"
        "@pytest.mark.parametrize('index', range(12))\n"
        "def test_who(index):\n"
        "    here = pathlib.Path(__file__).with_name(f'{index}.txt')\n"
        "    here.write_text(f'{os.environ[\"PYTEST_XDIST_WORKER\"]} {os.getppid()}')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate(timeout=HANG_SECONDS)
        assert "12 passed" in output
        who = [path.read_text().split() for path in tmp_path.glob("*.txt")]
        assert {worker for worker, _ in who} <= {"gw0", "gw1"}
        assert {parent for _, parent in who} == {str(process.pid)}


def test_who_needs_the_whole_gpu_comes_last() -> None:
    items: list[Any] = [Item(name, marker) for name, marker in (("a", "whole_gpu"), ("b", "gpu"), ("c", "gpu"))]
    pytest_collection_modifyitems(items)
    assert [item.name for item in items] == ["b", "c", "a"]


class Item(NamedTuple):
    name: str
    marker: str

    def get_closest_marker(self, name: str) -> str | None:
        return name if name == self.marker else None
