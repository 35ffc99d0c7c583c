"""PrivateTree: a copy of the checkout in a temporary folder, in which tests run against a changed source.

The checkout itself is never written to. Bytecode is compiled once and trusted by the hash of its source, so that a
change of a file is seen even within one tick of the clock, and all other files are not compiled again.
"""

import compileall
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from types import TracebackType

from tests.source_tree import ROOT

_LEFT_OUT = ("__pycache__", "build", "dist", "*.egg-info")
_MEMORY_KIB = 12 * 2**20  # what a process may allocate: a mutant that never stops appending is killed
_SURVIVED, _FAILED, _INTERRUPTED = 0, 1, 2  # pytest's exit codes; 2: an error in collecting, with -x


@dataclass(frozen=True)
class TestRun:
    """passed: whether all tests did. seconds: of CPU. by: the first test that failed, or how the run ended."""

    __test__ = False

    passed: bool
    seconds: float
    by: str = ""


class BrokenRun(RuntimeError):
    """pytest could not do what was asked (no such file, nothing collected): says nothing about the mutant."""


class PrivateTree:
    """Use it in a `with` statement; the copy is removed at its end, and what still runs in it is killed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nanovllm-mutants-")
        self.root = Path(self._folder.name) / "checkout"
        self._scratch = Path(self._folder.name) / "tmp"  # for what a killed run leaves
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def __enter__(self) -> "PrivateTree":
        self.root.mkdir()
        self._scratch.mkdir()
        for path in ROOT.iterdir():
            if path.is_dir() and not path.name.startswith((".", "build", "dist")):
                shutil.copytree(path, self.root / path.name, ignore=shutil.ignore_patterns(*_LEFT_OUT))
            elif path.is_file():
                shutil.copy(path, self.root / path.name)
        compileall.compile_dir(self.root / "nanovllm", quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """End the run that is under way, and start no other. May be called from another thread."""
        self._is_closed = True
        self._kill_group()

    def _kill_group(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            _kill(process.pid)

    def run_changed(self, file: str, source: str, tests: tuple[str, ...], cpu_limit: float) -> TestRun:
        """As run, with `source` in place of the text of `file`."""
        with _Changed(self.root / file, source):
            return self.run(tests, cpu_limit)

    def run(self, tests: tuple[str, ...], cpu_limit: float) -> TestRun:
        """Run `tests` (paths or node ids, or one file of cases for Triton's interpreter) until one fails.

        More than cpu_limit seconds of CPU count as a failure.
        A generous limit of the clock stands behind it, for what waits and computes nothing. Raises BrokenRun.
        """
        if self._is_closed:
            raise BrokenRun("the tree is closed")
        limits = f'ulimit -t {int(cpu_limit) + 1}; ulimit -d {_MEMORY_KIB}; exec "$@"'
        command = ["sh", "-c", limits, "sh", *_command(tests)]
        log = self.root.parent / "log"
        with log.open("wb") as output:
            self._process = process = subprocess.Popen(
                command,
                cwd=self.root,
                env={**_environment(), "TMPDIR": str(self._scratch)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            timer = threading.Timer(60 + 10 * cpu_limit, self._kill_group)
            timer.start()
            try:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            finally:
                timer.cancel()
                _kill(process.pid)  # what a killed run had started and not ended
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)
        return self._judged(process.returncode, usage.ru_utime + usage.ru_stime, log.read_text(errors="replace"))

    def _judged(self, code: int, seconds: float, output: str) -> TestRun:
        if self._is_closed:
            raise BrokenRun("the run was interrupted")
        if code == _SURVIVED:
            return TestRun(True, seconds)
        if code < 0:
            return TestRun(False, seconds, f"killed by {signal.Signals(-code).name}: too long, too large, or crashed")
        if code not in (_FAILED, _INTERRUPTED):
            raise BrokenRun(f"pytest ended with {code}:\n{output[-3000:]}")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)[:1]
        last_case = re.findall(r"^(.* \((?:in order|reversed|shuffled)\))$", output, re.MULTILINE)[-1:]
        return TestRun(False, seconds, (failed or last_case or ["the run itself"])[0])


class _Changed:
    """Within it, `path` holds `source`."""

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source, self._original = path, source, path.read_bytes()

    def __enter__(self) -> None:
        self._path.write_text(self._source, encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.write_bytes(self._original)


def _command(tests: tuple[str, ...]) -> list[str]:
    if tests[0].endswith("_cases.py"):
        (cases,) = tests
        module = cases.removesuffix(".py").replace("/", ".")
        return ["env", "TRITON_INTERPRET=1", sys.executable, "-m", "tests.support.kernels.interpreting", module]
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return [*pytest, "-p", "tests.mutants.pytest_plugin", *tests]


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """One seed for all runs, so that a mutant meets the same fate again."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "NANOVLLM_"))}
    kept.pop("PYTHONPATH", None)
    return {**kept, "HYPOTHESIS_PROFILE": "dev", "NANOVLLM_TEST_SEED": "0", "OMP_NUM_THREADS": "1"}
