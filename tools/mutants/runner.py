"""Runs the tests of each mutant against a changed private copy of the checkout, which is never written to.

The copy is a folder and not an import hook, because Triton, the wheel's test and the processes that tests start read
files. Each run of pytest is a fork of this process, which has imported torch and transformers once, but no module of
the checkout besides tools.mutants.
"""

import compileall
import contextlib
import gc
import importlib
import importlib.metadata
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NoReturn

from tools.mutants.mutant import Mutant

CPU_SECONDS = 120  # of one process; one that computes for longer is killed
WALL_SECONDS = 300  # of one mutant, for tests that wait and compute nothing; generous: the machine may be loaded
HANG_SECONDS = 60  # of one wait in a test: some mutants make a test hang, which shows the mutant
_MEMORY_BYTES = 12 * 2**30  # of one process, for a mutant that never stops appending
_PYTEST = ["pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
_PYTEST += ["-W", "ignore:Module already imported so cannot be rewritten"]  # plugins
_CHECKOUT = Path(__file__).resolve().parents[2]  # in sys.path through PYTHONPATH, perhaps
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")

# What most tests import, besides pytest's plugins. Without triton: some tests set variables before they import it.
_LIBRARIES = ("torch", "transformers", "transformers.models.auto.tokenization_auto", "hypothesis.stateful")
_ENVIRONMENT = {  # the libraries read some of it while they are imported; tests/conftest.py sets the same
    "HF_HUB_OFFLINE": "1",
    "HYPOTHESIS_PROFILE": "dev",
    "NANOVLLM_TEST_HANG_SECONDS": str(HANG_SECONDS),
    "NANOVLLM_TEST_SEED": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class BrokenRun(RuntimeError):
    """pytest could not run the tests (no such test, wrong arguments): this says nothing about the mutant."""


def import_libraries() -> None:
    """Import what every fork would import. Changes this process's environment."""
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "NANOVLLM_"))]:
        del os.environ[name]
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    sys.dont_write_bytecode = False  # pytest rewrites the asserts of each file once for all mutants
    os.environ.update(_ENVIRONMENT)
    for name in _LIBRARIES:
        importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        if not plugin.name.startswith("xdist"):
            plugin.load()
    gc.freeze()  # the forks' collections do not touch, and so do not copy, what was just imported


class Copy:
    """A copy of the checkout in `folder`, in which one pytest at a time runs."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self._log, self._scratch = folder / "checkout", folder / "log", folder / "tmp"
        self.root.mkdir(parents=True)
        for path in root.iterdir():
            if path.is_dir() and not _LEFT_OUT(str(root), [path.name]) and path.name != "mutants":  # mutmut's folder
                shutil.copytree(path, self.root / path.name, ignore=_LEFT_OUT)
            elif path.is_file():
                shutil.copy(path, self.root)
        self._scratch.mkdir()
        # Trust bytecode by its source's hash: a file that changes twice in one tick of the clock is compiled twice.
        compileall.compile_dir(self.root / "nanovllm", quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)

    def start(self, tests: Iterable[str], mutant: Mutant | None = None) -> None:
        """Begin to run `tests`, with the change of `mutant` in place until stop()."""
        self._original = None
        if mutant is not None:
            path, text = mutant.apply(self.root)
            self._original = path, path.read_bytes()
            path.write_text(text, encoding="utf-8")
        self._deadline = time.monotonic() + WALL_SECONDS
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._run_pytest(tests, is_limited=mutant is not None)
        with contextlib.suppress(PermissionError, ProcessLookupError):  # if the fork was faster
            os.setpgid(self._pid, self._pid)

    def _run_pytest(self, tests: Iterable[str], is_limited: bool) -> NoReturn:
        """In the forked process: what `python -m pytest` would do in the copy."""
        import hypothesis.configuration

        code = 3  # pytest's code for an internal error
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if is_limited:
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
                resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            os.chdir(self.root)
            os.environ["TMPDIR"], tempfile.tempdir = str(self._scratch), None
            sys.path[:] = [str(self.root), *(path for path in sys.path[1:] if path != str(_CHECKOUT))]
            hypothesis.configuration.set_hypothesis_home_dir(self.root / ".hypothesis")
            for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
                del sys.modules[name]  # the tests import those of the copy
            sys.argv = [*_PYTEST, *tests]
            runpy.run_module("pytest", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # without the clean-up that is the runner's, which would remove the copies

    def passed(self) -> bool | None:
        """Whether the tests passed; None while they run. Raises BrokenRun."""
        is_running = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        if is_running and time.monotonic() < self._deadline:
            return None
        code = self.stop()
        if code > 2:  # pytest's codes: 0 passed, 1 failed, 2 an error while collecting; below 0: killed
            raise BrokenRun(f"pytest ended with {code}:\n{self.output()}")
        return code == 0

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def stop(self) -> int:
        """Kill the run and what it started, and put the code back. Returns pytest's exit code; below 0: a signal."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        if self._original is not None:
            self._original[0].write_bytes(self._original[1])
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)
        return os.waitstatus_to_exitcode(status)


def check_baseline(root: Path, mutants: Iterable[Mutant], workers: int) -> None:
    """Raises BrokenRun unless the tests pass on the unchanged code."""
    runs = [(tests, None) for tests in dict.fromkeys(mutant.tests for mutant in mutants)]
    for _, passed, output in _run_all(root, runs, workers):
        if not passed:
            raise BrokenRun(f"a test fails on the unchanged code:\n{output}")


def run_mutants(root: Path, mutants: Iterable[Mutant], workers: int) -> Iterator[tuple[Mutant, bool]]:
    """(mutant, whether a test failed) as they come, `workers` mutants at a time. Raises BrokenRun."""
    for mutant, passed, _ in _run_all(root, [(mutant.tests, mutant) for mutant in mutants], workers):
        assert mutant is not None
        yield mutant, not passed


def _run_all(
    root: Path, runs: list[tuple[tuple[str, ...], Mutant | None]], workers: int
) -> Iterator[tuple[Mutant | None, bool, str]]:
    """(mutant, whether the tests passed, end of pytest's output) of each (tests, mutant) in `runs`, as they end."""
    import_libraries()
    todo = runs[::-1]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        idle = [Copy(root, Path(folder) / str(i)) for i in range(min(workers, len(todo)))]
        busy: dict[Copy, Mutant | None] = {}
        try:
            while todo or busy:
                while idle and todo:
                    tests, mutant = todo.pop()
                    copy = idle.pop()
                    copy.start(tests, mutant)
                    busy[copy] = mutant
                time.sleep(0.02)
                for copy in list(busy):
                    try:
                        passed = copy.passed()
                    except BrokenRun:
                        del busy[copy]
                        raise
                    if passed is not None:
                        idle.append(copy)
                        yield busy.pop(copy), passed, copy.output()
        finally:
            for copy in busy:
                copy.stop()
