"""Floors: the least that a run must have compared and met, or it fails, though every test passed.

They apply when everything ran, not to a part of it. Each is about half of what the smallest profile (dev) was seen to
reach, so that another draw passes and a campaign that lost its point does not.
"""

from typing import NamedTuple

from tests.report.facts import GPU, WHOLE, Facts


class Floor(NamedTuple):
    least: int
    why: str


COMPARISONS: dict[str, dict[str, Floor]] = {WHOLE: {}, GPU: {}}
EVENTS: dict[str, dict[str, Floor]] = {WHOLE: {}, GPU: {}}


LEAST_MUTATION_SCORE = 1.0  # of the listed mutants that are not equivalent
LEAST_GENERIC_SCORE = 0.95  # of a generic tool's, among which nobody looked for the equivalent ones


def num_mutants(score: dict) -> int:
    return score["mutants"] if "mutants" in score else score["total"]


def mutation_score(score: dict) -> float:
    """Caught, of those that are not equivalent."""
    noticeable = num_mutants(score) - score.get("equivalent", 0)
    return score["caught"] / noticeable if noticeable else 1.0


def judge(facts: Facts) -> list[str]:
    """Each figure of the run that lies below its floor, in words. A run that failed tests is not judged: it fails."""
    if facts.has_failed:
        return []
    problems = []
    for what, floors, figures in (
        ("comparisons", COMPARISONS, facts.counts.comparisons),
        ("events", EVENTS, facts.counts.events),
    ):
        for name, floor in floors.get(facts.scope, {}).items():
            if figures[name] < floor.least:
                problems.append(f"{what}: {name}: {figures[name]:,}, below the floor of {floor.least:,} ({floor.why})")
    return problems + _judge_mutants(facts.mutants or {})


def _judge_mutants(mutants: dict) -> list[str]:
    scores = [(name, score, LEAST_MUTATION_SCORE) for name, score in mutants.get("components", {}).items()]
    if mutants.get("generic"):
        scores.append(("the generic tool's", mutants["generic"], LEAST_GENERIC_SCORE))
    return [
        f"mutants: {name}: {mutation_score(score):.1%} noticed, below the floor of {least:.0%}"
        for name, score, least in scores
        if mutation_score(score) < least
    ]
