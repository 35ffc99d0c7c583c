"""Counts, report and list of skips on a small suite, run in a process of its own, with and without xdist."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support import counts
from tests.support.counts import counting
from tests.support.limits import HANG_SECONDS
from tests.support.report import RunData, to_html
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
    count_comparisons("things <b>& against an oracle", 300)
    record_error("bound", n, 10)
def test_fails_if_told_to():
    assert "FAIL" not in os.environ
def test_skips_if_told_to():
    if "SKIP" in os.environ:
        pytest.skip("CUDA out of memory")
def test_interrupts_if_told_to():
    if "INTERRUPT" in os.environ:
        raise KeyboardInterrupt
"""
XDIST = ("-p", "xdist", "-n", "1")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p tests.support.report_plugin\n")
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


@pytest.mark.parametrize("workers", [(), XDIST], ids=["one process", "xdist"])
def test_the_report_adds_up_what_the_tests_counted(suite: Path, workers: tuple[str, ...]) -> None:
    code, output = run(suite, *workers, "--report")
    assert code == 0, output
    assert f"written: {Path('.report/report.txt')}" in output
    rows = [line.split() for line in (suite / ".report" / "report.txt").read_text().splitlines()]
    assert ["things", "<b>&", "an", "oracle", "1,200", "4"] in rows
    assert ["set", "up", "0"] in rows
    assert ["torn", "down", "4"] in rows
    assert ["bound", "3", "10", "30", "%"] in rows
    assert ["7", "tests", "passed,", "0", "failed,", "0", "skipped"] in rows
    html = (suite / ".report" / "report.html").read_text()
    assert "<td>things &lt;b&gt;&amp;</td><td>an oracle</td>" in html


def test_a_skip_that_is_not_allowed_fails_the_run_and_stands_in_the_report(suite: Path) -> None:
    problem = "not on the list of tests/support/skips.py: test_small.py::test_skips_if_told_to (CUDA out of memory)"
    code, output = run(suite, "--report=there", SKIP="1")
    assert (code, problem in output) == (pytest.ExitCode.TESTS_FAILED, True)
    assert problem in (suite / "there" / "report.txt").read_text()
    assert run(suite, "-k", "counts")[0] == pytest.ExitCode.OK
    assert not (suite / ".report").exists(), "no report unless it is asked for"


def test_a_failed_test_is_in_the_report(suite: Path) -> None:
    assert run(suite, "--report", FAIL="1")[0] == pytest.ExitCode.TESTS_FAILED
    assert "6 tests passed, 1 failed" in (suite / ".report" / "report.txt").read_text()


def test_tests_are_not_taken_for_the_folder_of_the_report(suite: Path) -> None:
    code, output = run(suite, "--report", ".")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--report .: those are tests; write --report=FOLDER" in output


@pytest.mark.parametrize("workers", [(), XDIST], ids=["one process", "xdist"])
def test_an_interrupted_run_names_the_test_that_was_running(suite: Path, workers: tuple[str, ...]) -> None:
    output = run(suite, *workers, INTERRUPT="1")[1]
    assert "test_small.py::test_interrupts_if_told_to" in output.split("when the run was interrupted")[1]


def test_the_html_is_one_file_whose_tags_are_closed() -> None:
    class Reader(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in {"script", "link", "img"}
            self.open += [tag] if tag != "meta" else []

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(to_html(RunData(problems=["<i>"])))
    assert reader.open == []


def test_the_largest_share_of_a_tolerance_is_kept() -> None:
    with counting() as found:
        for error, allowed in ((1.0, 10.0), (2.0, 4.0), (3.0, 100.0)):
            counts.record_error("x", error, allowed)
    assert found.errors == {"x": (2.0, 4.0)}


@pytest.mark.parametrize(("error", "allowed"), [(0.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0), (0.0, -1.0)])
def test_an_error_without_meaning_is_refused(error: float, allowed: float) -> None:
    with pytest.raises(ValueError, match="for 'x'"):
        counts.record_error("x", error, allowed)
