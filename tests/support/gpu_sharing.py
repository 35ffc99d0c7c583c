"""Plugin: ends a run of GPU tests where there is no GPU, and shares one GPU between the processes of `pytest -m gpu`.

A run with `-m gpu` or `-m multi_gpu`, or one of them `and` more, ends in one line where there is no GPU. A test that
needs more GPUs than exist is skipped, unless --share-gpus is given: multi_gpu(N) needs N, multi_gpu alone needs 2.

`pytest -m gpu` runs in several processes unless -n says how many, since Triton's compiler, not the GPU, takes the time.
A test marked `whole_gpu`, which fills the GPU's memory or measures it, runs while no other does: each worker's other
GPU tests hold a file lock of their own, and such a test holds all of them.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

GPU_TESTS_ALONE = re.compile(r"(multi_)?gpu(\(.*\))?( and (?!.* or ).*)?")  # values of -m
MOST_WORKERS = 8  # each holds memory of the GPU, some tests 4 GiB and more


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share-gpus", action="store_true", help="run multi_gpu tests where ranks must share GPUs too")


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the number
def pytest_cmdline_main(config: pytest.Config) -> None:
    option = config.option
    if option.collectonly or hasattr(config, "workerinput"):
        return  # nothing is run, or this is such a process
    if not GPU_TESTS_ALONE.fullmatch(option.markexpr):
        return
    if not num_gpus():
        raise pytest.UsageError(f"-m {option.markexpr!r}: these tests need NVIDIA GPUs, and torch finds none here")
    if option.markexpr.startswith("multi_gpu"):
        return  # several GPUs are shared only where -n is given
    if getattr(option, "numprocesses", 0) is not None or option.usepdb:
        return  # no xdist, or -n was given; a debugger wants one process
    if any("::" in argument for argument in config.args):
        return  # starting processes would take longer than a few tests
    option.numprocesses = min(MOST_WORKERS, (os.cpu_count() or 1) // 2)
    option.dist = "worksteal"  # for some tests take a hundred times as long as others


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


@pytest.hookimpl(tryfirst=True)  # before its fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = max([marker.args[0] if marker.args else 2 for marker in item.iter_markers("multi_gpu")], default=0)
    if needed and needed > (there := num_gpus()) and not (there and item.config.getoption("share_gpus")):
        pytest.skip(f"needs {needed} GPUs, there are {there}")


@pytest.hookimpl(trylast=True)  # after random_order's, which was loaded before
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need the whole GPU come last: before that, all others would wait for the longest test under way."""
    items.sort(key=lambda item: item.get_closest_marker("whole_gpu") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout's: waiting is not the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    if item.get_closest_marker("gpu") is None:
        return (yield)
    with held(
        _folder(),
        exclusively=item.get_closest_marker("whole_gpu") is not None,
        slot=int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]),
    ):
        try:
            return (yield)
        finally:
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # for the tests of other processes


@contextmanager
def held(folder: Path, exclusively: bool, slot: int = 0) -> Iterator[None]:
    """One of the MOST_WORKERS locks in `folder` (slot says which), or all of them, across processes and threads.

    A test takes its locks while it holds the lock `order`, so that no later test overtakes one that waits for all.
    """
    slots = range(MOST_WORKERS) if exclusively else [slot % MOST_WORKERS]
    with ExitStack() as stack:
        with FileLock(folder / "order.lock"):
            for number in slots:
                stack.enter_context(FileLock(folder / f"slot-{number}.lock"))
        yield


def _folder() -> Path:
    """One for each GPU, as far as CUDA_VISIBLE_DEVICES tells them apart."""
    gpu = re.sub(r"\W", "-", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    folder = Path(tempfile.gettempdir()) / f"nanovllm-gpu-tests-{os.getuid()}{gpu and '-'}{gpu}"
    folder.mkdir(exist_ok=True)
    return folder
