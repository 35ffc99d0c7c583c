"""Runs the tests of each mutant against a changed private copy of the checkout, which is never written to.

A copy and not an import hook, because Triton, the wheel's test and the processes that tests start read files.
"""

import compileall
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from py_compile import PycInvalidationMode

from tools.mutants.mutant import Mutant

CPU_SECONDS = 120  # of one process; one that computes for longer is killed
WALL_SECONDS = 300  # of one mutant, for tests that wait and compute nothing; generous: the machine may be loaded
HANG_SECONDS = 60  # of one wait in a test: some mutants make a test hang, which shows the mutant
_MEMORY_KIB = 12 * 2**20  # of one process, for a mutant that never stops appending
_PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")


class BrokenRun(RuntimeError):
    """pytest could not run the tests (no such test, wrong arguments): this says nothing about the mutant."""


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
        """Begin to run `tests`, with the change of `mutant` in place until the run has ended."""
        self._original = None
        if mutant is not None:
            path, text = mutant.apply(self.root)
            self._original = path, path.read_bytes()
            path.write_text(text, encoding="utf-8")
        self.mutant = mutant
        limits = f'ulimit -t {CPU_SECONDS}; ulimit -d {_MEMORY_KIB}; exec "$@"' if mutant else 'exec "$@"'
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "NANOVLLM_"))}
        kept.pop("PYTHONPATH", None)
        one_seed = {"HYPOTHESIS_PROFILE": "dev", "NANOVLLM_TEST_SEED": "0", "OMP_NUM_THREADS": "1"}
        one_seed["NANOVLLM_TEST_HANG_SECONDS"] = str(HANG_SECONDS)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", limits, "sh", *_PYTEST, *tests],
                cwd=self.root,
                env={**kept, **one_seed, "TMPDIR": str(self._scratch)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._deadline = time.monotonic() + WALL_SECONDS

    def passed(self) -> bool | None:
        """Whether the tests passed; None while they run. Raises BrokenRun."""
        if self._process.poll() is None and time.monotonic() < self._deadline:
            return None
        self.stop()
        code = self._process.wait()
        if code > 2:  # pytest's codes: 0 passed, 1 failed, 2 an error while collecting; below 0: killed
            raise BrokenRun(f"pytest ended with {code}:\n{self.output()}")
        return code == 0

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def stop(self) -> None:
        """Kill the run and what it started, and put the code back."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._original is not None:
            self._original[0].write_bytes(self._original[1])
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)


def check_baseline(root: Path, mutants: Iterable[Mutant]) -> None:
    """Raises BrokenRun unless the tests pass on the unchanged code."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(root, Path(folder))
        try:
            copy.start(dict.fromkeys(path for mutant in mutants for path in mutant.paths))
            while (passed := copy.passed()) is None:
                time.sleep(0.05)
        finally:
            copy.stop()
        if not passed:
            raise BrokenRun(f"a test fails on the unchanged code:\n{copy.output()}")


def run_mutants(root: Path, mutants: Iterable[Mutant], workers: int) -> Iterator[tuple[Mutant, bool]]:
    """(mutant, whether a test failed) as they come, `workers` mutants at a time. Raises BrokenRun."""
    todo = list(mutants)[::-1]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Copy(root, Path(folder) / str(i)) for i in range(min(workers, len(todo)))]
        busy: list[Copy] = []
        try:
            while todo or busy:
                for copy in copies:
                    if copy not in busy and todo:
                        mutant = todo.pop()
                        copy.start(mutant.tests, mutant)
                        busy.append(copy)
                time.sleep(0.02)
                for copy in busy[:]:
                    passed = copy.passed()
                    if passed is not None:
                        busy.remove(copy)
                        assert copy.mutant is not None
                        yield copy.mutant, not passed
        finally:
            for copy in busy:
                copy.stop()
