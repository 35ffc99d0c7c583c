"""A failing test leaves a trace, its report says how to replay it, and --replay reproduces the failure: whole runs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.limits import HANG_SECONDS
from tests.replay.plugin import FOLDER

ROOT = Path(__file__).parents[2]
EVICTION = str(ROOT / "tests/replay/corpus/eviction.jsonl")
FAULT = """
from nanovllm.engine.scheduler import Scheduler

def take_one_too_many(self, seq):
    return None if seq.num_completion_tokens <= seq.sampling_params.max_tokens else "length"

Scheduler._finish_reason = take_one_too_many
"""
TEST = """
from hypothesis import given, settings, strategies as st
from tests.unit.engine.harness import add_prompt, make_scheduler, run

@settings(max_examples=40, database=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_lengths(lengths):
    scheduler = make_scheduler(30, 2)
    seqs = [add_prompt(scheduler, n, seq_id, max_tokens=3) for seq_id, n in enumerate(lengths)]
    run(scheduler)
    assert [seq.num_completion_tokens for seq in seqs] == [3] * len(seqs)
"""


def pytest_run(folder: Path, *args: str, fault: bool) -> tuple[int, str]:
    """Exit status and output of pytest in `folder`, with a faulty scheduler or the real one."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "tests.replay.plugin", "-p", "no:cacheprovider", "-q"]
    command += ["--rootdir", str(folder), "-c", str(folder / "pytest.ini"), "--import-mode=importlib", "--noconftest"]
    command += [*(["-p", "planted_fault"] if fault else []), *args]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run whose one test failed, because of a fault that was planted; and its output."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted_fault.py").write_text(FAULT)
    (folder / "test_planted.py").write_text(TEST)
    (folder / "pytest.ini").write_text("[pytest]\n")
    status, output = pytest_run(folder, "test_planted.py", fault=True)
    assert status == 1, output
    return folder, output


def test_a_failing_test_leaves_one_trace_and_names_the_command(failed: tuple[Path, str]) -> None:
    """Of forty examples, the shrunk one: a single prompt of one token."""
    folder, output = failed
    (trace,) = (folder / ".traces").iterdir()
    assert f"python -m pytest --replay .traces/{trace.name}" in output
    text = trace.read_text()
    assert text.count('"do": "add"') == 1
    assert '"prompt": [100]' in text
    assert '"failed": "test_planted.py::test_lengths"' in text


def test_the_replay_reproduces_the_failure(failed: tuple[Path, str]) -> None:
    folder, _ = failed
    (trace,) = (folder / ".traces").iterdir()
    status, output = pytest_run(folder, "--replay", str(trace), fault=True)
    assert status == 1
    assert "reproduced, the run goes as recorded in all of its 4 steps: test_planted.py::test_lengths" in output
    assert "AssertionError" in output
    assert list((folder / ".traces").iterdir()) == [trace], "a replay leaves no trace of its own"


def test_without_the_fault_the_replay_names_the_first_difference(failed: tuple[Path, str]) -> None:
    folder, _ = failed
    (trace,) = (folder / ".traces").iterdir()
    status, output = pytest_run(folder, "--replay", f".traces/{trace.name}", fault=False)
    assert status == 1
    assert "the run does not go as recorded: step 2, endings: recorded [], now [[0, 'length']]" in output


def test_a_passing_test_leaves_nothing_and_a_corpus_trace_passes(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    assert pytest_run(tmp_path, "test_planted.py", fault=False)[0] == 0
    assert not (tmp_path / ".traces").exists()
    status, output = pytest_run(tmp_path, "--replay", EVICTION, fault=False)
    assert status == 0, output
    assert "1 passed" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--replay", "nothing.jsonl"], "ERROR: --replay: cannot read the trace"),
        (["--replay", EVICTION, "--replay-mode", "graph"], "ERROR: --replay-mode graph needs --replay-device cuda"),
    ],
)
def test_what_cannot_be_replayed_is_a_usage_error(failed: tuple[Path, str], args: list[str], message: str) -> None:
    status, output = pytest_run(failed[0], *args, fault=False)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert message in output
    assert "Traceback" not in output


@pytest.fixture
def trace_in_the_checkout() -> Iterator[Path]:
    """Where failing tests leave theirs."""
    path = ROOT / FOLDER / f"copy-for-a-test-{os.getpid()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/replay/corpus/preemption.jsonl", path)
    yield path
    path.unlink()


def test_the_option_is_known_in_the_checkout(trace_in_the_checkout: Path) -> None:
    """pytest takes FILE for a folder of tests until it has found the plugin, with the project's own files only."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--replay", str(trace_in_the_checkout)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "1 passed" in process.stdout
