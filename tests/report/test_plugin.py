"""The plugins on a tiny suite of their own, in a process of its own: random order, evidence, floors, skips."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import evidence
from tests.source_tree import ROOT

INI = """[pytest]
testpaths = tests
addopts = -m "not gpu"
markers = gpu: run with -m gpu
"""
CONFTEST = """
from tests.report import floors, plugin, skips
pytest_plugins = ["tests.report.plugin"]
plugin.read_defects = dict
plugin.read_mutants = dict
floors.COMPARISONS = {"the whole CPU suite": {"things against an oracle": floors.Floor(6, "planted")}}
floors.EVENTS = {}
skips.STATED[:] = [skips.Stated(r"tests/test_one.py::test_skipped", "no x", 1, "planted", lambda: True)]
"""
TEST_ONE = """
import os, subprocess, sys, pytest
from tests.evidence import compared, happened, tolerated
@pytest.mark.parametrize("n", range(4))
def test_counts(n):
    compared("things against an oracle")
    happened("event", 2)
    tolerated("bound", n, 10)
def test_counts_in_another_process():
    code = "from tests.evidence import *; compared('things against an oracle', 2); tolerated('bound', 4, 10)"
    subprocess.run([sys.executable, "-c", code], check=True)
def test_skipped():
    pytest.skip("no x")
@pytest.mark.gpu
def test_left_out():
    raise RuntimeError
"""
TEST_TWO = """
import os, pytest
@pytest.mark.parametrize("n", range(5))
def test_order(n):
    pass
def test_fails_if_told_to():
    assert "FAIL" not in os.environ
def test_skips_if_told_to():
    if "SKIP" in os.environ:
        pytest.skip("CUDA out of memory")
def test_interrupts_if_told_to():
    if "INTERRUPT" in os.environ:
        raise KeyboardInterrupt
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text(INI)
    for name, text in (("conftest", CONFTEST), ("test_one", TEST_ONE), ("test_two", TEST_TWO)):
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    return tmp_path


def run(suite: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and output."""
    kept = {name: value for name, value in os.environ.items() if name not in (evidence.FOLDER, "NANOVLLM_TEST_SEED")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", *arguments],
        cwd=suite,
        env=kept | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return result.returncode, result.stdout + result.stderr


def order(output: str) -> list[str]:
    return re.findall(r"^(tests/\S+::\S+) [A-Z]+ ", output, re.MULTILINE)


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "two workers"])
def test_evidence_of_all_processes_is_added_up(suite: Path, workers: tuple[str, ...]) -> None:
    """4 things in pytest's own processes, 2 in one that a test starts; of the errors, the worst."""
    code, output = run(suite, *workers, "--report")
    assert code == 0, output
    text = (suite / ".report" / "report.txt").read_text()
    assert re.search(r"things +an oracle +6 +6", text)
    assert re.search(r"event +8", text)
    assert re.search(r"bound +4 +10 .* 40 %", text)
    assert re.search(r"test_one.py::test_skipped +no x +planted", text)
    assert "Tests: 13 passed, 0 failed, 1 skipped" in text
    assert re.search(r"NANOVLLM_TEST_SEED=\d* python -m pytest -v .*--report$", text, re.MULTILINE)
    assert (suite / ".report" / "report.html").read_text().startswith("<!doctype html>")


def test_a_whole_run_below_a_floor_fails_and_a_part_does_not(suite: Path) -> None:
    (suite / "tests" / "test_one.py").write_text(TEST_ONE.replace("oracle', 2", "oracle', 1"))
    code, output = run(suite, "--report=there")
    assert code == 1
    assert "comparisons: things against an oracle: 5, below the floor of 6 (planted)" in output
    assert "below the floor" in (suite / "there" / "report.txt").read_text()
    code, output = run(suite, "--report=there", "-k", "counts")
    assert code == 0, output
    assert "no floor was applied" in (suite / "there" / "report.txt").read_text()


def test_a_skip_that_is_not_stated_fails_without_a_report_too(suite: Path) -> None:
    code, output = run(suite, "tests/test_two.py", SKIP="1")
    assert code == 1
    assert "not on the list of tests/report/skips.py: tests/test_two.py::test_skips_if_told_to (CUDA out" in output
    code, output = run(suite, "tests/test_one.py")
    assert code == 0, output
    assert not (suite / ".report").exists()


def test_a_file_that_is_not_collected_fails_a_whole_run(suite: Path) -> None:
    (suite / "tests" / "conftest.py").write_text(f"{CONFTEST}collect_ignore = ['test_two.py']\n")
    code, output = run(suite)
    assert code == 1
    assert "never collected: tests/test_two.py" in output


def test_tests_are_not_taken_for_the_folder_of_the_report(suite: Path) -> None:
    code, output = run(suite, "--report", "tests")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--report tests: those are tests; write --report=FOLDER" in output


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "1")], ids=["one process", "xdist"])
def test_an_interrupted_run_names_what_has_not_ended(suite: Path, workers: tuple[str, ...]) -> None:
    _, output = run(suite, *workers, INTERRUPT="1")
    assert "interrupted" in output
    named = output.split("tests have not ended")[1].split("!!!")[0]
    assert "tests/test_two.py::test_interrupts_if_told_to" in named
    ended = re.findall(r"(tests/\S+) PASSED|PASSED (?:\[.*?\] )?(tests/\S+)", output.split("tests have not ended")[0])
    assert not any((first or second) in named for first, second in ended)
    assert "tests have not ended" not in run(suite, *workers)[1]
