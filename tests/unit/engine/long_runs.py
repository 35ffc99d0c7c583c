"""Runs of EngineMachine and its subclasses: Hypothesis' short ones, and long ones in which every event occurs."""

import random

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.engine_events import assert_occurred
from tests.support.engine_machine import EngineMachine
from tests.support.scheduling import two_bit_hash

EVENTS = (
    "preemption", "prefill chunk", "block hit", "block evicted", "hash collision", "forced decode",
    "not stored again", "request refused",
)  # fmt: skip
ASYNC_EVENTS = ("async step", "token discarded")


class MachineWithCollisions(EngineMachine):
    hash_function = staticmethod(two_bit_hash)


def check_short_runs(machine: type[EngineMachine]) -> None:
    """Above 30, half as many as other tests draw: each has 40 rules, and the long runs have the rare events."""
    number = settings().max_examples
    number = min(number, max(30, number // 2))
    run_state_machine_as_test(machine, settings=settings(max_examples=number, stateful_step_count=40))


def play_until_everything_occurred(machine: type[EngineMachine], num_runs: int = 25) -> None:
    """Long runs through the machine's rules, so that every event occurs; Hypothesis' own runs are short.

    machine: one with a hash that collides. num_runs: the least. The rarest event occurs in every second run or so, so
    that ten times as many runs without it mean that it cannot occur any more.
    """
    machine.seen.clear()
    required = (*EVENTS, *ASYNC_EVENTS) if machine.supports_async_scheduling else EVENTS
    rng = random.Random(random.getrandbits(32))  # the seed of the run decides
    flood(machine())
    for number in range(10 * num_runs):
        if number >= num_runs and all(machine.seen[event] for event in required):
            break
        long_run(machine(), rng, is_async=number % 2 == 1)
    assert_occurred(machine.seen, required)


def long_run(machine: EngineMachine, rng: random.Random, is_async: bool) -> None:
    machine.start(rng.randint(6, 12), rng.randint(1, 4), rng.randint(2, 4), rng.randint(0, 2), is_async)
    for number in range(40):
        prompts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 18))] for _ in range(rng.randint(0, 2))]
        machine.add(prompts, rng.randint(1, 12), ignore_eos=rng.random() < 0.7)
        machine.step(rng.randint(1, 6))
        if rng.random() < 0.1:
            machine.step_with_an_abort_inside(number)
        if number % 8 == 0:
            machine.add_what_can_never_fit(rng.randint(1, 30), 9)
        machine.limits_and_invariants_hold()
    machine.teardown()


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
