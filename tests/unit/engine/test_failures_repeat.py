"""A state machine that fails can be run again: from the line with its blob, and as the program that Hypothesis prints.

How to keep one: paste the program as a test under "kept examples" below; it needs no Hypothesis and no database.
"""

import ast
import re
from typing import Any

import pytest
from hypothesis import Phase, reproduce_failure, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.engine_machine import EngineMachine
from tests.unit.engine.test_scheduler_against_reference import LockStep


def failing_machine() -> type[EngineMachine]:
    """A new class each time, as Hypothesis keeps what it is told about a class with the class."""

    class Faulty(EngineMachine):
        def check_writes(self, batch: Any) -> None:
            super().check_writes(batch)
            assert self.scheduler.num_preemptions == 0, "planted: a preemption"

    return Faulty


# Without shrinking: it would take half a minute here, and what is printed is printed in the same way.
SEARCH = settings(
    max_examples=200,
    stateful_step_count=20,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)


def found_failure() -> str:
    """What Hypothesis adds to the exception, and pytest prints beneath it."""
    with pytest.raises(AssertionError, match="planted") as failure:
        run_state_machine_as_test(failing_machine(), settings=SEARCH)
    return "\n".join(failure.value.__notes__)


def test_a_failing_machine_runs_again_from_its_line_and_from_its_program() -> None:
    notes = found_failure()
    line = re.search(r"@reproduce_failure\(('.*'), (b'.*')\)", notes)
    assert line, notes
    version, blob = map(ast.literal_eval, line.groups())
    with pytest.raises(AssertionError, match="planted"):
        run_state_machine_as_test(reproduce_failure(version, blob)(failing_machine()), settings=SEARCH)

    program = "\n".join(text for text in notes.splitlines() if text.startswith("state"))
    with pytest.raises(AssertionError, match="planted"):
        exec(program, {"Faulty": failing_machine()})


# --- kept examples: programs that once failed, or that show an event with as few requests as can be ---


@pytest.mark.parametrize("machine", [EngineMachine, LockStep])
def test_the_smallest_run_with_a_preemption(machine: type[EngineMachine]) -> None:
    """D08: two sequences of one token each outgrow three blocks of one token."""
    state = machine()
    state.start(num_blocks=3, block_size=1, max_num_seqs=2, spare_budget=0)
    state.limits_and_invariants_hold()
    state.add_a_crowd(prompts=[[0], [0]])
    state.limits_and_invariants_hold()
    state.teardown()
    assert state.scheduler.num_preemptions > 0
