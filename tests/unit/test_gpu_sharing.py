"""How the GPU tests share a GPU: which tests run at the same time, and in how many processes."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock, Timeout

from tests.support import gpu_sharing
from tests.support.gpu_sharing import held, pytest_cmdline_main, pytest_runtest_setup
from tests.support.programs import run_python


def test_a_whole_gpu_test_runs_alone_and_is_not_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sharing, "FileLock", partial(FileLock, timeout=0))  # raises Timeout where it would wait
    with held(tmp_path, exclusively=False, slot=0):
        with held(tmp_path, exclusively=False, slot=1):
            pass  # tests for one GPU run side by side
        with pytest.raises(Timeout), held(tmp_path, exclusively=True):
            pass
    with held(tmp_path, exclusively=True), pytest.raises(Timeout), held(tmp_path, exclusively=False, slot=3):
        pass
    order = FileLock(tmp_path / "order.lock")  # as one that waits for all holds it
    with order, pytest.raises(Timeout), held(tmp_path, exclusively=False):
        pass


def workers(**options: Any) -> Any:
    """The number of processes that the plugin sets for xdist."""
    defaults = {"markexpr": "gpu", "numprocesses": None, "usepdb": False, "collectonly": False, "dist": "no"}
    of_config = {"args": options.pop("arguments", ["tests"])}
    if "workerinput" in options:  # what xdist gives a worker's config
        of_config["workerinput"] = options.pop("workerinput")
    config: Any = SimpleNamespace(option=SimpleNamespace(**{**defaults, **options}), **of_config)
    pytest_cmdline_main(config)
    return config.option.numprocesses


def test_without_a_gpu_the_run_is_one_line() -> None:
    """A run of its own, with the exit code of a wrong option."""
    result = run_python("-m", "pytest", "-m", "multi_gpu(4)", CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout.strip()) == (pytest.ExitCode.USAGE_ERROR, "")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("ERROR: -m 'multi_gpu(4)': these tests need NVIDIA GPUs")


@pytest.mark.parametrize(
    ("there", "is_shared", "skipped"),
    [(1, False, {2, 4}), (2, False, {4}), (4, False, set()), (1, True, set()), (0, True, {2, 4})],
)
def test_a_test_that_needs_more_gpus_than_there_are_is_skipped(
    monkeypatch: pytest.MonkeyPatch, there: int, is_shared: bool, skipped: set[int]
) -> None:
    """multi_gpu without a number needs two GPUs; tests for one GPU are never skipped. is_shared: --share-gpus."""
    marks: dict[int, list[Any]] = {0: [], 2: [SimpleNamespace(args=())], 4: [SimpleNamespace(args=(4,))]}
    config = SimpleNamespace(getoption=lambda name: is_shared)
    monkeypatch.setattr("tests.support.gpu_sharing.num_gpus", lambda: there)
    for number, mark in marks.items():
        item: Any = SimpleNamespace(iter_markers=lambda name, mark=mark: mark, config=config)
        if number not in skipped:
            pytest_runtest_setup(item)
            continue
        with pytest.raises(pytest.skip.Exception, match=f"needs {number} GPUs, there are {there}"):
            pytest_runtest_setup(item)


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 8),
        ({"numprocesses": 3}, 3),
        ({"markexpr": "gpu and not whole_gpu"}, 8),
        *(({"markexpr": other}, None) for other in ("not gpu and not slow", "gpu_like", "")),
        *(({"markexpr": more}, None) for more in ("gpu or campaign", "gpu and not slow or campaign")),
        ({"markexpr": "multi_gpu"}, None),
        ({"usepdb": True}, None),
        ({"collectonly": True}, None),
        ({"arguments": ["tests/e2e/test_gpu.py::test_close_gives_gpu_memory_back"]}, None),
        ({"workerinput": {}}, None),  # the processes start no processes
    ],
)
def test_only_a_run_of_gpu_tests_gets_processes(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], number: int | None
) -> None:
    monkeypatch.setattr("tests.support.gpu_sharing.num_gpus", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert workers(**options) == number
