"""The seed that is printed repeats a run in another checkout; the line printed with a failure repeats that test.

Hypothesis mixes constants of the loaded modules into its draws, so a drawn example is repeated by the whole run, or
alone by the blob that Hypothesis prints with it. The suite that fails is a small one of its own, under
tests/conftest.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT

# Runs first, and loads a module full of constants: Hypothesis likes to draw those.
TEST_A = "def test_loads_a_module():\n    import ours\n"
OURS = f"NUMBERS = {[10**6 + 7 * number for number in range(100)]}\n"
# What fails depends on every draw; without shrinking, which would lead from any failure to the same smallest one.
TEST_B = """
import pytest, random
from hypothesis import Phase, given, settings, strategies as st

@settings(phases=[Phase.generate])
@given(st.lists(st.integers(0, 10**7), min_size=100, max_size=100))
def test_property(numbers):
    assert sum(numbers) % 2 == 0

@pytest.mark.gpu
def test_of_a_gpu():
    drawn = random.random()
    assert drawn > 2
"""
INI = """[pytest]
addopts = -p tests.conftest -m "not gpu"
markers = gpu: run with -m gpu
"""


@pytest.fixture
def checkouts(tmp_path: Path) -> list[Path]:
    """Two of the same."""
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
        for name, text in {"test_a.py": TEST_A, "ours.py": OURS, "test_b.py": TEST_B, "pytest.ini": INI}.items():
            (folder / name).write_text(text)
    return folders


def output_of(command: str, checkout: Path) -> str:
    """What `command`, for a shell, prints. It fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "NANOVLLM_"))}
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, shell=True, cwd=checkout, env=kept | paths, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def failures(output: str) -> dict[str, str]:
    """Line that repeats it -> what the failed assertion said, and the failing example."""
    lines = re.findall(r"^(HYPOTHESIS_PROFILE=.* python -m pytest .*)$", output, re.MULTILINE)
    examples = re.split(r"^_{3,} .* _{3,}$", output, flags=re.MULTILINE)[1:]
    said = ["\n".join(re.findall(r"^E  .*$", example, re.MULTILINE)) for example in examples]
    return dict(zip(lines, said, strict=True))


def test_the_printed_seed_repeats_the_whole_run(checkouts: list[Path]) -> None:
    here, there = checkouts
    found = failures(output_of("python -m pytest -p no:cacheprovider", here))
    assert len(found) == 1
    assert all(found.values())
    command = next(iter(found)).partition(" 'test_")[0]
    assert failures(output_of(f"{command} -p no:cacheprovider", there)) == found


def test_the_printed_line_repeats_a_test_alone(checkouts: list[Path]) -> None:
    here, there = checkouts
    ((line, message),) = failures(output_of("python -m pytest -p no:cacheprovider -m gpu", here)).items()
    assert "> 2" in message
    assert failures(output_of(line, there)) == {line: message}
