"""Shrinks a scenario that breaks a contract to the fewest steps.

Not Hypothesis' shrinker: a candidate may crash or hang its process, so that the next one runs in another process, and
shrinking starts from a scenario that was recorded before the crash.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.conformance.components.explore import Scenario, Step
from tests.conformance.components.sizes import Setup

MINIMAL = {"block_size": 2, "num_blocks": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1}
MAX_RUNS = 1000  # of candidates, to shrink one scenario


def shrink(
    scenario: Scenario, still_breaks: Callable[[Scenario], Scenario | None], max_runs: int = MAX_RUNS
) -> Scenario:
    """The smallest scenario found that breaks the same contract.

    still_breaks: the scenario up to the step that breaks the contract, or None if nothing breaks it.
    """
    best, runs, is_smaller = scenario, set[Scenario](), True
    while is_smaller:
        is_smaller, position = False, 0
        candidates = list(_candidates(best))
        while position < len(candidates) and len(runs) < max_runs:
            candidate = candidates[position]
            position += 1
            if candidate in runs or size(candidate) >= size(best):
                continue
            runs.add(candidate)
            found = still_breaks(candidate)
            if found is not None and size(found) < size(best):
                best, is_smaller = found, True
                candidates = list(_candidates(best))  # and go on from the same position
    return best


def size(scenario: Scenario) -> tuple[Any, ...]:
    adds = [step for step in scenario.steps if step[0] == "add"]
    setup = scenario.setup
    return (
        len(scenario.steps),
        sum(len(step[1]) + step[2] for step in adds),
        sum(map(sum, (step[1] for step in adds))) + sum(step[3] for step in adds),
        len(setup.given),
        sum(getattr(setup, name) for name in MINIMAL),
    )


def _candidates(scenario: Scenario) -> Iterator[Scenario]:
    """Smaller scenarios, the boldest first. They are of `scenario` as it was, so that some no longer fit."""
    setup, steps = scenario.setup, scenario.steps
    for length in (8, 4, 2, 1):
        for index in range(0, len(steps), max(1, length // 2)):
            yield Scenario(setup, _without(steps, index, index + length))
    for first in range(len(steps)):
        if steps[first][0] == "add":
            for second in range(first + 1, len(steps)):
                rest = _without(steps, second, second + 1)
                yield Scenario(setup, _without(rest, first, first + 1))
    for index, step in enumerate(steps):
        if step[0] != "add":
            continue
        kind, tokens, max_tokens, ignore_eos = step
        changes = [(tokens[: len(tokens) // 2 or 1], max_tokens), (tokens[:-1], max_tokens), (tokens[1:], max_tokens)]
        changes += [(tokens, 1), (tokens, max_tokens // 2), (tokens, max_tokens - 1)]
        changes += [(tuple(0 for _ in tokens), max_tokens)]
        changes += [((*tokens[:i], 0, *tokens[i + 1 :]), max_tokens) for i, token in enumerate(tokens) if token]
        for new_tokens, new_max in changes:
            if new_tokens and new_max >= 1:
                yield Scenario(setup, (*steps[:index], (kind, new_tokens, new_max, ignore_eos), *steps[index + 1 :]))
        yield Scenario(setup, (*steps[:index], (kind, tokens, max_tokens, False), *steps[index + 1 :]))
    for number in range(len(MINIMAL) + 1):
        for kept in itertools.combinations(MINIMAL, number):
            sizes = {name: getattr(setup, name) for name in kept}
            for is_async in {False, setup.is_async}:
                yield from _fitting(Setup(weak_hash=setup.weak_hash, is_async=is_async, **sizes), steps)
    for name, least in MINIMAL.items():
        value = getattr(setup, name)
        for other in sorted({least, value // 2, value - 1, getattr(Setup(), name)}):
            if least <= other != value:
                yield from _fitting(replace(setup, **{name: other}), steps)


def _without(steps: tuple[Step, ...], start: int, end: int) -> tuple[Step, ...]:
    """Steps without those of the range; aborts keep their request."""
    adds = [index for index, step in enumerate(steps) if step[0] == "add"]
    left = [number for number, index in enumerate(adds) if not start <= index < end]
    kept = [step for step in (*steps[:start], *steps[end:]) if step[0] != "abort" or step[1] in left]
    return tuple(("abort", left.index(step[1])) if step[0] == "abort" else step for step in kept)


def _fitting(setup: Setup, steps: tuple[Step, ...]) -> Iterator[Scenario]:
    """The steps with requests that are cut to fit the smaller setup: their outputs, or their prompts first."""
    room = setup.num_slots
    for is_prompt_first in (False, True):
        cut = []
        for step in steps:
            if step[0] == "add":
                tokens = step[1][: max(1, room - (step[2] if is_prompt_first else 1))]
                step = ("add", tokens, max(1, min(step[2], room - len(tokens))), step[3])
            cut.append(step)
        yield Scenario(setup, tuple(cut))


def without_finish(scenario: Scenario) -> Scenario:
    """The scenario as it is drawn: run() adds the finish."""
    return Scenario(scenario.setup, tuple(step for step in scenario.steps if step != ("finish",)))


def is_legal(scenario: Scenario, is_chunked: bool) -> bool:
    """Whether every request fits, so that a target has to serve it."""
    setup = scenario.setup
    least = setup.max_num_seqs if is_chunked else setup.num_slots
    lengths = [len(step[1]) + step[2] for step in scenario.steps if step[0] == "add"]
    return setup.max_num_batched_tokens >= least and max(lengths, default=0) <= setup.num_slots
