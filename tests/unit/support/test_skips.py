"""Floors and skips: what fails a run in which every test passed, shown with planted figures."""

from collections import Counter

import pytest

from tests.evidence import Counts
from tests.report import floors, skips
from tests.report.facts import GPU, PART, WHOLE, Facts, Skip
from tests.report.floors import Floor
from tests.report.skips import Stated

FLOORS = {"engine: tokens": Floor(100, "half of what was seen")}


def facts(number: int, scope: str = WHOLE, **more: object) -> Facts:
    return Facts(scope=scope, counts=Counts(Counter({"engine: tokens": number}), Counter(preemption=number)), **more)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "COMPARISONS", {WHOLE: FLOORS})
    monkeypatch.setattr(floors, "EVENTS", {WHOLE: {"preemption": Floor(50, "a campaign")}})


@pytest.mark.usefixtures("planted")
def test_a_figure_below_its_floor_is_named_with_both() -> None:
    assert floors.judge(facts(100)) == []
    (problem,) = floors.judge(facts(99))
    assert problem == "comparisons: engine: tokens: 99, below the floor of 100 (half of what was seen)"
    assert len(floors.judge(facts(49))) == 2


@pytest.mark.usefixtures("planted")
def test_a_figure_that_is_missing_is_zero() -> None:
    assert floors.judge(Facts(scope=WHOLE))[0].startswith("comparisons: engine: tokens: 0, below")


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("scope", [PART, GPU])
def test_floors_are_those_of_the_run(scope: str) -> None:
    assert floors.judge(facts(0, scope)) == []


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("outcome", ["failed", "error"])
def test_a_run_that_failed_is_not_blamed_for_its_figures(outcome: str) -> None:
    assert floors.judge(facts(0, outcomes=Counter({outcome: 1}))) == []


@pytest.mark.parametrize(
    ("mutants", "num_problems"),
    [
        (None, 0),
        ({"components": {"engine": {"mutants": 10, "caught": 8, "equivalent": 2}}}, 0),
        ({"components": {"engine": {"mutants": 10, "caught": 7, "equivalent": 2}}}, 1),
        ({"generic": {"tool": "t", "total": 100, "caught": 95}}, 0),
        ({"generic": {"tool": "t", "total": 100, "caught": 94}}, 1),
    ],
)
def test_mutants_that_nothing_noticed_fail_the_run(mutants: dict | None, num_problems: int) -> None:
    assert len(floors.judge(Facts(scope=WHOLE, mutants=mutants))) == num_problems + len(
        floors.judge(Facts(scope=WHOLE))
    )


def test_every_floor_has_a_reason_and_is_a_figure_that_can_be_missed() -> None:
    every = [item for part in (floors.COMPARISONS, floors.EVENTS) for known in part.values() for item in known.items()]
    assert [name for name, floor in every if not floor.why or floor.least < 0] == []


SKIP = Skip("tests/test_a.py::test_b[1]", "could not import 'x'")
STATED = Stated(
    r"tests/test_a\.py::test_b.*", r"could not import 'x'", at_most=2, why="x is an extra", expected=lambda: True
)


def test_a_stated_skip_passes_up_to_its_number() -> None:
    assert skips.judge([], [STATED]) == []
    assert skips.judge([SKIP, SKIP], [STATED]) == []
    assert skips.judge([SKIP] * 3, [STATED]) == [f"3 skips where at most 2 are stated: {STATED.test}"]


@pytest.mark.parametrize(
    "skip",
    [
        Skip("tests/test_a.py::test_c", "could not import 'x'"),
        Skip("tests/test_a.py::test_b", "CUDA out of memory"),
        Skip("other/tests/test_a.py::test_b", "could not import 'x'"),
    ],
)
def test_another_test_or_reason_fails(skip: Skip) -> None:
    (problem,) = skips.judge([skip], [STATED])
    assert skip.test in problem
    assert skip.reason in problem
    assert "not on the list" in problem


def test_a_stated_skip_fails_where_nothing_is_missing() -> None:
    present = Stated(STATED.test, STATED.reason, 2, STATED.why, expected=lambda: False)
    (problem,) = skips.judge([SKIP], [present])
    assert "nothing that it needs is missing here" in problem
