"""Scheduler and BlockManager under everything that can happen: EngineMachine, with the engine's hash and a weak one.

tools/mutants puts faults in slots, tables, seeds, messages and hits that only these tests judge: each is a wrong token.
"""

import pytest

from tests.support.engine_machine import EngineMachine
from tests.unit.engine.long_runs import MachineWithCollisions, check_short_runs, play_until_everything_occurred


@pytest.mark.parametrize("machine", [EngineMachine, MachineWithCollisions])
def test_no_run_reads_a_wrong_key_breaks_a_limit_or_starves_anyone(machine: type[EngineMachine]) -> None:
    """D01 D02 D04 D05 D06 D07 D08 D09 D10 D13 D15 D16 D17 D18 D19 D57. Each request ends within its bound of steps."""
    check_short_runs(machine)


def test_every_event_occurs() -> None:
    """D05, D08, D09, D15, D17: as above, in long runs."""
    play_until_everything_occurred(MachineWithCollisions)
