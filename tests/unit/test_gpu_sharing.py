"""How the GPU tests share a GPU: which tests run at the same time, and in how many processes."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.gpu_sharing import gpus_needed_by, held, pytest_cmdline_main, pytest_runtest_setup
from tests.support.limits import HANG_SECONDS
from tests.support.programs import run_python

SHORT = 0.2  # seconds, a thread that must wait has not entered by then


class LockHolder(threading.Thread):
    """A thread that takes the lock, sets is_in, and keeps the lock until leave()."""

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


def test_a_whole_gpu_test_runs_alone_and_is_not_overtaken(tmp_path: Path) -> None:
    sharer, second = (LockHolder(tmp_path, exclusively=False, slot=slot) for slot in (0, 1))
    assert sharer.is_in.wait(HANG_SECONDS)
    assert second.is_in.wait(HANG_SECONDS), "tests for one GPU run side by side"
    second.leave()
    alone = LockHolder(tmp_path, exclusively=True)
    assert not alone.is_in.wait(SHORT)
    latecomer = LockHolder(tmp_path, exclusively=False)
    assert not latecomer.is_in.wait(SHORT)
    sharer.leave()
    assert alone.is_in.wait(HANG_SECONDS)
    assert not latecomer.is_in.is_set()
    alone.leave()
    assert latecomer.is_in.wait(HANG_SECONDS)
    latecomer.leave()


def workers(**options: Any) -> Any:
    """The number of processes that the plugin sets for xdist."""
    defaults = {"markexpr": "gpu", "numprocesses": None, "usepdb": False, "collectonly": False, "dist": "no"}
    of_config = {"args": options.pop("arguments", ["tests"])}
    if "workerinput" in options:  # what xdist gives a worker's config
        of_config["workerinput"] = options.pop("workerinput")
    config: Any = SimpleNamespace(option=SimpleNamespace(**{**defaults, **options}), **of_config)
    pytest_cmdline_main(config)
    return config.option.numprocesses


@pytest.mark.parametrize(
    ("markexpr", "needed"),
    [
        ("gpu", {1}),
        ("gpu and not whole_gpu", {1}),
        ("not (not gpu)", {1}),
        ("multi_gpu", {2}),
        ("gpu or multi_gpu", {1, 2}),
        ("gpu or campaign", {0, 1, 2}),  # a campaign may need several
        ("not gpu", {0, 2}),
        ("not gpu and not multi_gpu and not campaign and not real_model", {0}),
        ("", {0, 1, 2}),
        ("gpu and", {0}),  # pytest refuses it
        ("gpu and not gpu", {0}),  # selects nothing
    ],
)
def test_what_a_run_needs_follows_from_the_meaning_of_its_markers(markexpr: str, needed: set[int]) -> None:
    assert gpus_needed_by(markexpr) == needed


@pytest.mark.parametrize(
    ("markexpr", "needed"), [("multi_gpu", "several NVIDIA GPUs"), ("gpu and not whole_gpu", "an NVIDIA GPU")]
)
def test_without_a_gpu_the_run_is_one_line(markexpr: str, needed: str) -> None:
    """A run of its own, with the exit code of a wrong option."""
    result = run_python("-m", "pytest", "-m", markexpr, CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout.strip()) == (pytest.ExitCode.USAGE_ERROR, "")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"ERROR: -m '{markexpr}': these tests need {needed}")


def test_a_test_that_needs_more_gpus_than_there_are_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """multi_gpu without a number needs two GPUs; tests for one GPU are never skipped."""
    marks: dict[int, list[Any]] = {0: [], 2: [SimpleNamespace(args=())], 4: [SimpleNamespace(args=(4,))]}
    items = {number: SimpleNamespace(iter_markers=lambda name, mark=mark: mark) for number, mark in marks.items()}
    for there, skipped in ((1, {2, 4}), (2, {4}), (4, set())):
        monkeypatch.setattr("tests.support.gpu_sharing.num_gpus", lambda there=there: there)
        for number, item in items.items():
            if number not in skipped:
                pytest_runtest_setup(item)  # type: ignore[arg-type]
                continue
            with pytest.raises(pytest.skip.Exception, match=f"needs {number} GPUs, there are {there}"):
                pytest_runtest_setup(item)  # type: ignore[arg-type]


def test_only_a_run_of_gpu_tests_gets_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.gpu_sharing.num_gpus", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert workers() == 8
    assert workers(numprocesses=3) == 3
    assert workers(markexpr="not gpu") is None
    assert workers(markexpr="multi_gpu") is None
    assert workers(usepdb=True) is None
    assert workers(collectonly=True) is None
    assert workers(arguments=["tests/e2e/test_gpu.py::test_close_gives_gpu_memory_back"]) is None
    assert workers(workerinput={}) is None, "the processes start no processes"
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert workers() == 2
