"""The refusals hold under `python -O`, which removes nanovllm's asserts (pytest rewrites those of the tests)."""

import subprocess
import sys
from pathlib import Path

from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT

API_TESTS = [
    "tests/e2e/test_errors.py",
    "tests/unit/test_config.py",
    "tests/unit/test_sampling_params.py",
    "tests/unit/test_validation.py",
    "tests/unit/test_model_config.py",
    "tests/unit/engine/test_scheduler_requests.py",
]
# pytest's note that asserts outside of test modules do nothing under -O: which is the point
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestConfigWarning"]


def run_under_o(*paths: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-O", "-m", "pytest", *OPTIONS, *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)


def test_api_tests_pass_under_o():
    """D72: what users get wrong is refused by `raise`, not by assert."""
    result = run_under_o(*API_TESTS)
    assert result.returncode == 0, result.stdout


def test_assert_in_a_test_fails_under_o(tmp_path):
    """The control of the test above: under -O a test can still fail."""
    (tmp_path / "test_fails.py").write_text("def test_fails():\n    assert 1 == 2\n")
    result = run_under_o(tmp_path / "test_fails.py")
    assert result.returncode == 1
    assert "assert 1 == 2" in result.stdout
