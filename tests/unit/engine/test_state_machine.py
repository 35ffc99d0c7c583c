"""Scheduler and BlockManager under everything that can happen: EngineMachine, with the engine's hash and a weak one."""

import random

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.engine.engine_machine import EngineMachine
from tests.unit.engine.harness import two_bit_hash


class MachineWithCollisions(EngineMachine):
    hash_function = staticmethod(two_bit_hash)


@pytest.mark.parametrize("machine", [EngineMachine, MachineWithCollisions])
def test_no_run_reads_a_wrong_key_breaks_a_limit_or_starves_anyone(machine: type[EngineMachine]) -> None:
    """D02 D05 D08 D09 D10 D13 D15 D16 D17 D18 D19; and liveness: each request ends within its bound of steps."""
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=40))


def flood(machine: EngineMachine) -> None:
    """One sequence decodes; then three prompts arrive that take 9 prefill steps of 4 tokens, one more than may come
    between two of its tokens.
    """
    machine.start(num_blocks=12, block_size=4, max_num_seqs=4, spare_budget=0)
    machine.add([[0]], max_tokens=12, ignore_eos=True)
    machine.step(2)
    machine.add([[0] * 12, [1] * 12, [0, 1] * 6], max_tokens=1, ignore_eos=True)
    machine.step(20)
    machine.teardown()


def test_long_runs_in_which_everything_happens() -> None:
    """D05, D08, D09, D15, D17: as above, with every event for certain."""
    EngineMachine.seen.clear()
    rng = random.Random(random.getrandbits(32))  # NANOVLLM_TEST_SEED decides
    for run in range(25):
        machine = MachineWithCollisions()
        goes_ahead = run % 2 == 1
        machine.start(rng.randint(6, 12), rng.randint(1, 4), rng.randint(2, 4), rng.randint(0, 2), goes_ahead)
        for number in range(40):
            prompts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 18))] for _ in range(rng.randint(0, 2))]
            machine.add(prompts, rng.randint(1, 12), ignore_eos=rng.random() < 0.7)
            machine.step(rng.randint(1, 6))
            if rng.random() < 0.1:
                machine.step_with_an_abort_inside(number)
            if rng.random() < 0.1:
                machine.add_what_can_never_fit(rng.randint(1, 30), 9)
            machine.limits_and_invariants_hold()
        machine.teardown()
    flood(MachineWithCollisions())
    events = (
        "preemption", "prefill chunk", "block hit", "block evicted", "hash collision", "forced decode",
        "not stored again", "refused at the door", "step ahead", "computed in vain",
    )  # fmt: skip
    assert all(EngineMachine.seen[event] for event in events), EngineMachine.seen
