"""Counts, report and list of skips on a small suite, run in a process of its own, with and without xdist."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.counts import counting, record_error
from tests.support.limits import HANG_SECONDS
from tests.support.skips import Skip, check
from tests.support.source_tree import ROOT

TEST = """
import os, pytest
from tests.support.counts import count_comparisons, count_event, record_error
@pytest.fixture
def of_a_fixture():
    count_event("set up", 0)
    yield
    count_event("torn down")
@pytest.mark.parametrize("n", range(4))
def test_counts(n, of_a_fixture):
    count_comparisons("things against an oracle", 300)
    record_error("bound", n, 10)
def test_does_as_told():
    assert "FAIL" not in os.environ
    if "SKIP" in os.environ:
        pytest.skip("CUDA out of memory")
    if "INTERRUPT" in os.environ:
        raise KeyboardInterrupt
"""
XDIST = ("-p", "xdist", "-n", "1")
with_and_without_xdist = pytest.mark.parametrize("workers", [(), XDIST], ids=["one process", "xdist"])


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p tests.support.report\n")
    (tmp_path / "test_small.py").write_text(TEST)
    return tmp_path


def run(suite: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=suite,
        env=kept | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    return result.returncode, result.stdout + result.stderr


@with_and_without_xdist
def test_the_report_adds_up_what_the_tests_counted(suite: Path, workers: tuple[str, ...]) -> None:
    code, output = run(suite, *workers, "--report")
    assert code == 0, output
    assert f"written: {Path('.report/report.md')}" in output
    lines = (suite / ".report" / "report.md").read_text().splitlines()
    assert {"- things against an oracle: 1,200", "- set up: 0", "- torn down: 4"} <= set(lines)
    assert {"- 30% of bound: 3 of 10", "- 5 tests passed, 0 failed, 0 skipped"} <= set(lines)


def test_a_failed_test_is_in_the_report(suite: Path) -> None:
    assert run(suite, "--report=there", FAIL="1")[0] == pytest.ExitCode.TESTS_FAILED
    assert "4 tests passed, 1 failed" in (suite / "there" / "report.md").read_text()


def test_a_skip_that_is_not_allowed_fails_the_run(suite: Path) -> None:
    code, output = run(suite, SKIP="1")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "not on the list of tests/support/skips.py: test_small.py::test_does_as_told (CUDA out of memory)" in output
    assert not (suite / ".report").exists(), "no report unless it is asked for"


def test_tests_are_not_taken_for_the_folder_of_the_report(suite: Path) -> None:
    assert "--report .: those are tests; write --report=FOLDER" in run(suite, "--report", ".")[1]


@with_and_without_xdist
def test_an_interrupted_run_names_the_test_that_was_running(suite: Path, workers: tuple[str, ...]) -> None:
    output = run(suite, *workers, INTERRUPT="1")[1]
    assert "test_small.py::test_does_as_told" in output.split("when the run was interrupted")[1]


def test_the_largest_share_of_a_tolerance_is_kept_and_one_without_meaning_refused() -> None:
    with counting() as found:
        for error, allowed in ((1.0, 10.0), (2.0, 4.0), (3.0, 100.0)):
            record_error("x", error, allowed)
        for error, allowed in ((0.0, 0.0), (float("nan"), 1.0)):
            with pytest.raises(ValueError, match="for 'x'"):
                record_error("x", error, allowed)
    assert found.errors == {"x": (2.0, 4.0)}


PACKED = "tests/unit/layers/test_packed_weights.py::test_b[1]"


@pytest.mark.parametrize(
    ("test", "reason", "problem"),
    [
        ("a", "could not import 'vllm.v1': No module named 'vllm.v1'", None),
        ("a", "could not import 'gguf': No module named 'gguf'", None),
        ("a", "could not import 'numpy': No module named 'numpy'", "not on the list"),
        ("a", "could not import 'triton': No module named 'triton'", "nothing that it needs is missing here"),
        (PACKED, "needs oneDNN on x86", None),
        ("a", "needs oneDNN on x86", "not on the list"),
        (f"other/{PACKED}", "needs oneDNN on x86", "not on the list"),
    ],
)
def test_which_skips_are_allowed(monkeypatch: pytest.MonkeyPatch, test: str, reason: str, problem: str | None) -> None:
    """On a machine with Linux, another CPU than x86, and no optional package."""
    monkeypatch.setattr("tests.support.skips.find_spec", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    problems = check([Skip(test, reason)])
    assert len(problems) == (problem is not None)
    assert (problem or "") in "".join(problems)
