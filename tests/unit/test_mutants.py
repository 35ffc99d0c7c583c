"""tools/mutants: every mutant fits the code, every defect is put back, and the runner tells caught from surviving."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import run_python
from tests.support.source_tree import ROOT
from tools.defects import TABLE
from tools.mutants.mutant import MutantError, read_mutants
from tools.mutants.waiting import run_without_waiting

MUTANTS = read_mutants()


def test_every_mutant_fits_compiles_and_has_its_tests() -> None:
    changes = set()
    for mutant in MUTANTS:
        path, text = mutant.apply(ROOT)
        assert (path, text) not in changes, f"{mutant.id} is the same change as another"
        changes.add((path, text))
        if path.suffix == ".py":
            compile(text, str(path), "exec")
        for test in mutant.paths:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), f"{mutant.id}: {test}"
            assert name == "" or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{mutant.id}: {test}"


def test_every_known_defect_is_put_back_by_a_mutant() -> None:
    ids = [mutant.id for mutant in MUTANTS]
    assert len(set(ids)) == len(ids)
    known = set(re.findall(r"^\| (D\d\d) \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {mutant.defect for mutant in MUTANTS if mutant.defect} == known


# --- the tool itself, on a small project ---

CODE = """
LIMIT = 3

class Stack:
    def push(self, item):
        self.items.append(
            item,  # on top
        )
        if len(self.items) > LIMIT:
            raise ValueError("full")

    def pop(self):
        return self.items.pop()
"""
TEST = """
from nanovllm.stack import Stack

def test_push():
    stack = Stack()
    stack.items = []
    stack.push(1)
    assert stack.items == [1]
"""
MUTANT = "[{id}] {place}\nWhy.\ntests: test_stack.py\n- {old}\n+ {new}\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "nanovllm").mkdir()
    (tmp_path / "nanovllm" / "stack.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "test_stack.py").write_text(TEST, encoding="utf-8")
    return tmp_path


def write_mutants(project: Path, *mutants: tuple[str, str, str, str]) -> None:
    entries = [MUTANT.format(id=id_, place=place, old=old, new=new) for id_, place, old, new in mutants]
    (project / "small.mutants").write_text("\n".join(entries), encoding="utf-8")


def run(project: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, output) of the tool in a process of its own, since it forks."""
    done = run_python("-m", "tools.mutants", "--root", project, "--data", project, *arguments)
    return done.returncode, done.stdout + done.stderr


def test_runner_tells_caught_from_surviving_and_leaves_the_code(project: Path) -> None:
    caught = ("caught", "Stack.push", "self.items.append(item)", "pass")
    dies = ("dies", "Stack.push", "self.items.append(item)", "__import__('os').kill(0, 9)")
    survivor = ("survivor", "Stack.pop", "return self.items.pop()", "return None")
    write_mutants(project, caught, dies, survivor)
    code, output = run(project)
    assert code == 1
    assert "SURVIVED survivor in Stack.pop: Why.\n  - return self.items.pop()\n  + return None" in output
    assert "SURVIVED caught" not in output
    assert "2 of 3 mutants were caught" in output
    assert (project / "nanovllm" / "stack.py").read_text(encoding="utf-8") == CODE


def test_nothing_is_judged_when_the_tests_fail_on_the_unchanged_code(project: Path) -> None:
    (project / "test_stack.py").write_text("def test_nothing():\n    assert False\n", encoding="utf-8")
    write_mutants(project, ("survivor", "Stack.pop", "return self.items.pop()", "return None"))
    code, output = run(project)
    assert code == 2
    assert "a test fails on the unchanged code" in output


@pytest.mark.parametrize(("place", "old"), [("Stack.push", "item"), ("Stack.pop", "item"), ("Stack.peek", "self")])
def test_old_text_that_does_not_occur_once_is_refused(project: Path, place: str, old: str) -> None:
    write_mutants(project, ("a", place, old, "x"))
    with pytest.raises(MutantError, match=f"a: its old text must occur once in {place}, not "):
        read_mutants(project)[0].apply(project)


CHILDREN = """
import os, subprocess, sys
seconds = 600 if os.path.exists("/proc/self/schedstat") else 1
compute = "import time; end = time.monotonic() + 3\\nwhile time.monotonic() < end: pass"
programs = [
    f"import time; time.sleep({seconds})",
    compute,
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {compute!r}])",
]
children = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
open("codes", "w").write(str([child.wait() for child in children]))
sys.exit(3)
"""


def test_processes_that_wait_without_end_are_ended_and_those_that_compute_are_not(tmp_path: Path) -> None:
    """Nor those that wait for a process that computes. Other systems than Linux do not tell them apart."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_without_waiting([sys.executable, "-c", CHILDREN], tmp_path, longest_wait_s=1.5)
    ended = -signal.SIGXCPU if Path("/proc/self/schedstat").exists() else 0
    assert (tmp_path / "codes").read_text() == str([int(ended), 0, 0])
    assert caught.value.returncode == 3, "of the command"
