"""Shapes of forks: those that a table of adapters/ has are checked, the others are not applicable."""

import json
import re
from pathlib import Path

import pytest

from tests.conformance.components.contracts import AHEAD, CONTRACTS
from tests.conformance.components.document import SEED
from tests.conformance.components.examine import NOT_APPLICABLE
from tests.conformance.components.loading import NotRecognised, find_package
from tests.conformance.components.running import names, plant, run_checks, verdicts_of
from tests.conformance.components.targets import shapes
from tests.conformance.components.targets.faults import FAULTS
from tests.support.programs import run_python
from tests.support.source_tree import ROOT

AHEAD_CONTRACTS = [name for name, contract in CONTRACTS.items() if contract.group == AHEAD]
NOT_AHEAD = "Scheduler chooses no step ahead in a way that is known|two steps of Scheduler raise ValueError"


def test_known_shapes_are_checked_whole_and_clean(tmp_path: Path) -> None:
    """None of them has a scheduler that runs ahead."""
    found = verdicts_of(*plant(shapes.KNOWN, tmp_path), scenarios=60, seed=SEED)
    for name, verdicts in zip(shapes.KNOWN, found, strict=True):
        assert (names(verdicts, NOT_APPLICABLE), names(verdicts, "broken")) == (AHEAD_CONTRACTS, []), name
        assert re.match(NOT_AHEAD, verdicts["C42"]["reason"])


def test_faults_in_these_shapes_are_found(tmp_path: Path) -> None:
    found = verdicts_of(*plant(shapes.BROKEN_SHAPES, tmp_path), scenarios=60, seed=SEED)
    for (name, fault), verdicts in zip(shapes.BROKEN_SHAPES.items(), found, strict=True):
        assert verdicts[fault.contract]["verdict"] == "broken", name
        assert {fault.contract, *fault.also}.issuperset(names(verdicts, "broken")), name
    assert "IndexError" in found[1]["C04"]["message"]


def test_shapes_of_schedulers_that_run_ahead(tmp_path: Path) -> None:
    known, unknown = verdicts_of(*plant(shapes.AHEAD_SHAPES, tmp_path), scenarios=60, seed=SEED)
    assert names(known, "holds") == list(CONTRACTS)
    assert unknown["C41"]["verdict"] == NOT_APPLICABLE
    assert "AsyncScheduler" in unknown["C41"]["reason"]


def test_unknown_shapes_are_not_applicable(tmp_path: Path) -> None:
    found = verdicts_of(*plant(shapes.UNKNOWN, tmp_path), scenarios=60, seed=SEED)
    for reason, verdicts in zip(shapes.UNKNOWN, found, strict=True):
        for row in (verdicts[name] for name, contract in CONTRACTS.items() if not contract.script):
            assert row["verdict"] == NOT_APPLICABLE, row
            assert reason in row["reason"]


def test_wrong_hit_on_a_block_that_the_same_step_fills_is_one(tmp_path: Path) -> None:
    """And no slot that is overwritten: the block is entered under an old hash, which nothing forgets."""
    (path,) = plant({"": shapes.ENTERS_EARLY}, tmp_path)
    script = f"""
from tests.conformance.components.target import Target
target = Target({str(path)!r}, num_blocks=7)
for tokens in ([1, 1], [0] * 7, [1, 0, 0, 0, 1, 1], [1, 1, 0]):
    target.add(tokens, max_tokens=1)
target.step(2)
"""
    shown = run_python("-c", script, PYTHONPATH=str(ROOT)).stderr
    assert "Broken: C06: request 3 shares block 0, which request 2 fills in the same step" in shown


def test_swapping_that_no_scenario_comes_to_is_said(tmp_path: Path) -> None:
    paths = plant({"": shapes.NEVER_SWAPS}, tmp_path)
    (found,) = json.loads(run_checks(*paths, "--json", "--scenarios=5").stdout)["targets"]
    assert found["notes"] == [
        "blocks that are swapped to the CPU: no scenario has one, with the defaults of the fork's Config"
    ]


def test_script_says_nothing_where_another_contract_ends_it(tmp_path: Path) -> None:
    """And a reason of its own is not replaced by that of a contract that implies it."""
    ahead = shapes.shape(*FAULTS["C20 takes a token after each chunk"].texts)
    paths = plant({"both": shapes.TWO_FAULTS, "ahead": ahead, "one token": shapes.ONE_TOKEN}, tmp_path)
    hidden, implied, ends = verdicts_of(*paths, scenarios=60, seed=SEED)
    assert hidden["C25"]["reason"].startswith("C05 is broken before")
    assert "C20" in names(implied, "broken")
    assert implied["C43"]["reason"].startswith("Scheduler chooses no step ahead")
    assert ends["C27"]["verdict"] == "holds", "it ends with the token that the step of its prompt computes"


def test_package_is_found_by_its_scheduler(tmp_path: Path) -> None:
    for folder in ("src/tiny", "tests/other", ".venv/nanovllm", "deep/down/there"):
        (tmp_path / folder / "engine").mkdir(parents=True)
        (tmp_path / folder / "engine" / "scheduler.py").touch()
    assert find_package(tmp_path) == tmp_path / "src" / "tiny"


def test_folder_without_a_scheduler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotRecognised, match=r"has no PACKAGE/engine/scheduler\.py"):
        find_package(tmp_path)
