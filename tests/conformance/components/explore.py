"""Draws scenarios, and runs them on a target."""

import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.conformance.components.adapters.names import NEXT_STEP
from tests.conformance.components.adapters.steps import have_placeholders, postprocess
from tests.conformance.components.bounds import CALL_SECONDS
from tests.conformance.components.loading import NotRecognised
from tests.conformance.components.picture import picture
from tests.conformance.components.sizes import Setup
from tests.conformance.components.symbolic_cache import next_token
from tests.conformance.components.target import Broken, Target

Step = tuple[Any, ...]  # ("add", tokens, max_tokens, ignore_eos), ("step",), ("abort", number)
IMPORT = "from tests.conformance.components.target import Target"


@dataclass(frozen=True)
class Scenario:
    setup: Setup
    steps: tuple[Step, ...]

    def as_json(self) -> dict[str, Any]:
        return {"setup": self.setup.given, "steps": self.steps}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Scenario":
        steps = [[tuple(part) if isinstance(part, list) else part for part in step] for step in value["steps"]]
        return Scenario(Setup(**value["setup"]), tuple(map(tuple, steps)))

    def script(self, path: str, contract: str, message: str) -> str:
        """The lines that repeat it. The last one raises Broken."""
        sizes = "".join(f", {name}={value!r}" for name, value in self.setup.given.items())
        lines = [IMPORT, "", f"target = Target({path!r}, only={json.dumps(contract)}{sizes})"]  # ruff's quotes
        for step, same in itertools.groupby(self.steps):
            number = len(list(same))
            if step == ("step",):
                lines.append(f"target.step({number if number > 1 else ''})")
            else:
                lines += [f"target.{_call(*step)}"] * number
        lines[-1] += f"  # {contract}: {message}"
        return "\n".join(lines) + "\n"


def _call(kind: str, *values: Any) -> str:
    if kind != "add":
        return f"{kind}({', '.join(map(repr, values))})"
    tokens, max_tokens, ignore_eos = values
    return f"add({list(tokens)}, max_tokens={max_tokens}{', ignore_eos=True' if ignore_eos else ''})"


# --- drawing ---


def draw(rng: random.Random, is_chunked: bool, can_abort: bool, has_weak_hash: bool, runs_ahead: bool) -> Scenario:
    block_size, num_blocks = rng.choice((2, 2, 3, 4)), rng.randint(2, 9)
    room = num_blocks * block_size
    max_num_seqs = rng.randint(1, 4)
    budget = max_num_seqs + rng.randint(0, 6) if is_chunked and rng.random() < 0.7 else room + rng.randint(1, 8)
    is_weak, is_async = has_weak_hash and rng.random() < 0.25, runs_ahead and rng.random() < 0.5
    setup = Setup(block_size, num_blocks, max_num_seqs, budget, weak_hash=is_weak, is_async=is_async)
    steps: list[Step] = []
    texts: list[tuple[int, ...]] = []
    for _ in range(rng.randint(1, 7)):
        tokens = rng.choice(texts) if texts and rng.random() < 0.5 else _text(rng, room)
        if rng.random() < 0.3:
            tokens = _answered(rng, tokens)
        elif rng.random() < 0.5:
            tokens = tokens[: rng.randint(1, room)]
        tokens = tokens[: room - 1]
        texts.append(tokens)
        longest = room - len(tokens)
        max_tokens = longest if rng.random() < 0.3 else min(longest, rng.randint(1, 6))
        steps.append(("add", tokens, max_tokens, rng.random() < 0.5))
        steps += [("step",)] * rng.choice((0, 0, 1, 1, 2, 4, 12))
        if can_abort and rng.random() < 0.2:
            steps.append(("abort", rng.randrange(len(texts))))
        if can_abort and rng.random() < 0.1:  # in the middle of a prompt that comes again
            steps += [("add", tokens, 1, False), ("step",), ("abort", len(texts)), ("add", tokens, 1, False)]
            texts += [tokens, tokens]
    return Scenario(setup, tuple(steps))


def _answered(rng: random.Random, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """A prompt with its first answers and one token more: the next turn of a conversation."""
    result = list(tokens)
    for _ in range(rng.randint(1, 4)):
        result.append(next_token(result))
    return (*result, rng.randint(0, 1))


def _text(rng: random.Random, room: int) -> tuple[int, ...]:
    length = rng.randint(1, min(room, 14))
    letters = (0,) if rng.random() < 0.3 else (0, 1)
    return tuple(rng.choice(letters) for _ in range(length))


# --- running ---


@dataclass
class Outcome:
    """contract, message: what was broken first; None if all holds. scenario: up to that step."""

    contract: str | None
    message: str
    picture: str
    scenario: Scenario
    checked: Counter[str]
    not_applicable: dict[str, str]


def run(
    path: str, scenario: Scenario, muted: set[str], call_seconds: float = CALL_SECONDS, is_patient: bool = True
) -> Outcome:
    """Run `scenario` and finish all of its requests. muted: isolated contracts that are known to be broken.

    is_patient: as in Target.finish.
    """
    target = Target(path, **scenario.setup.given)
    target.muted, target.call_seconds = muted, call_seconds
    done: list[Step] = []
    contract, message = None, ""
    try:
        for step in scenario.steps:
            done.append(step)
            getattr(target, step[0])(*step[1:])
        done.append(("finish",))
        num_steps = target.num_steps
        target.finish(is_patient)
    except Broken as error:
        contract, message = error.contract, error.message
        if done[-1] == ("finish",) and contract not in ("C04", "C17"):
            done[-1:] = [("step",)] * (target.num_steps - num_steps)
    if scenario.setup.weak_hash and contract != "C07":
        contract = None
    shown = "" if contract is None else picture(target)
    return Outcome(
        contract, message, shown, Scenario(scenario.setup, tuple(done)), target.checked, target.not_applicable
    )


# --- what a target can do, found out by trying ---


def probe_chunked(path: str) -> bool:
    """Whether a prompt longer than max_num_batched_tokens is prefilled in chunks."""
    target = Target(path, block_size=2, num_blocks=8, max_num_seqs=2, max_num_batched_tokens=4)
    try:
        target.add([0, 1, 0, 1, 0, 1], max_tokens=1)
        _, batch = target.adapter.schedule()
        return bool(batch) and 0 < batch[0].count <= 4
    except Exception:
        return False


def probe_weak_hash(path: str) -> str:
    """Why the hash function cannot be made to collide; "" if it can."""
    try:
        Target(path, weak_hash=True)
    except NotRecognised as error:
        return str(error)
    return ""


def probe_ahead(path: str) -> str:
    """Why no scheduler can be asked for a step before the tokens of the step in front are known; "" if one can."""
    target = Target(path, is_async=True)
    name = type(target.adapter.scheduler).__name__
    try:
        if target.adapter.runs_behind:
            return ""
        target.add([0], max_tokens=3, ignore_eos=True)
        for _ in range(2):
            result, batch = target.adapter.schedule()
            if have_placeholders(batch):
                return ""
            postprocess(target.adapter, result, batch, [0])
    except NotRecognised as error:
        return str(error)
    except Exception as error:
        return f"two steps of {name} raise {type(error).__name__}: {error}"
    return f"{name} chooses no step ahead in a way that is known: it has no {NEXT_STEP}, its sequences no placeholders"
