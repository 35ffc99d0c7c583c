"""How the GPU tests share a GPU: who runs beside whom, and in how many processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tests.gpu_sharing import held, pytest_cmdline_main, pytest_collection_modifyitems
from tests.source_tree import ROOT

LONG = 20  # seconds, after which a thread that should have come is missing
SHORT = 0.2  # seconds, in which a thread that may not come does not


class Visitor(threading.Thread):
    """Takes the lock, says so, and keeps it until it is sent away."""

    def __init__(self, folder: Path, exclusively: bool) -> None:
        super().__init__(daemon=True)
        self.folder, self.exclusively = folder, exclusively
        self.is_in, self.may_go = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with held(self.folder, self.exclusively):
            self.is_in.set()
            self.may_go.wait(LONG)

    def leave(self) -> None:
        self.may_go.set()
        self.join(LONG)


def test_sharers_run_side_by_side(tmp_path: Path) -> None:
    visitors = [Visitor(tmp_path, exclusively=False) for _ in range(3)]
    assert all(visitor.is_in.wait(LONG) for visitor in visitors)
    for visitor in visitors:
        visitor.leave()


def test_who_wants_the_whole_gpu_is_alone_and_is_not_overtaken(tmp_path: Path) -> None:
    sharer = Visitor(tmp_path, exclusively=False)
    assert sharer.is_in.wait(LONG)
    alone = Visitor(tmp_path, exclusively=True)
    assert not alone.is_in.wait(SHORT)
    latecomer = Visitor(tmp_path, exclusively=False)
    assert not latecomer.is_in.wait(SHORT)
    sharer.leave()
    assert alone.is_in.wait(LONG)
    assert not latecomer.is_in.is_set()
    alone.leave()
    assert latecomer.is_in.wait(LONG)
    latecomer.leave()


def test_a_failure_lets_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path, exclusively=True):
        raise RuntimeError
    visitor = Visitor(tmp_path, exclusively=True)
    assert visitor.is_in.wait(LONG)
    visitor.leave()


def workers(**options: Any) -> Any:
    """The number of processes that the plugin asks xdist for."""
    defaults = {"markexpr": "gpu", "numprocesses": None, "usepdb": False, "collectonly": False, "dist": "no"}
    arguments = options.pop("arguments", ["tests"])
    config: Any = SimpleNamespace(option=SimpleNamespace(**{**defaults, **options}), args=arguments)
    pytest_cmdline_main(config)
    return config.option.numprocesses


def test_without_a_gpu_the_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gpu_sharing.has_gpu", lambda: False)
    with pytest.raises(pytest.UsageError, match="need an NVIDIA GPU"):
        workers()
    assert workers(markexpr="not gpu") is None
    assert workers(collectonly=True) is None


def test_only_a_run_of_gpu_tests_gets_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gpu_sharing.has_gpu", lambda: True)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert workers() == 8
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
        "import os, tests.gpu_sharing\n"
        "os.cpu_count = lambda: 4\n"
        "tests.gpu_sharing.has_gpu = lambda: True\n"
        "pytest_plugins = ['tests.gpu_sharing']\n"
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
        output, _ = process.communicate(timeout=100)
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
