"""The checks are checked: each planted fault is found and named by its contract alone, the right target is clean."""

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.components.contracts import CONTRACTS
from tests.conformance.components.document import DOCUMENT, NUM_SCENARIOS, PICTURES, SEED, pictures, section
from tests.conformance.components.running import names, plant, verdicts_of
from tests.conformance.components.targets.faults import FAULTS, HOSTILE, PARAMS, RIGHT, WRONG_FIXES, Fault
from tests.support.programs import run_python
from tests.support.source_tree import ROOT

LONG_SEEDS = range(5)
PARTS = 2


def test_every_contract_has_a_planted_fault() -> None:
    assert {fault.contract for fault in FAULTS.values()} == set(CONTRACTS)


@pytest.mark.parametrize("part", range(PARTS))
def test_planted_fault_is_named_by_its_contract_alone(part: int, tmp_path: Path) -> None:
    """With a smallest scenario of no more steps than it takes."""
    faults = dict(list(FAULTS.items())[part::PARTS])
    found = verdicts_of(*plant(faults, tmp_path), scenarios=NUM_SCENARIOS, seed=SEED)
    assert [names(verdicts, "broken") for verdicts in found] == [[fault.contract] for fault in faults.values()]
    text, remedy = DOCUMENT.read_text(encoding="utf-8"), "run python -m tests.conformance.components.document"
    for fault, verdicts in zip(faults.values(), found, strict=True):
        row = verdicts[fault.contract]
        assert fault.num_steps is None or row["num_steps"] <= fault.num_steps, row["script"]
        if next(other for other in FAULTS.values() if other.contract == fault.contract) is fault:
            assert section(CONTRACTS[fault.contract], row) in text, remedy
            for name, svg in pictures({fault.contract: row}).items():
                assert (PICTURES / f"{name}.svg").read_text(encoding="utf-8") == svg, remedy


def test_right_target_is_clean_and_wrong_fixes_are_found_and_shown_by_their_scripts(tmp_path: Path) -> None:
    """The script of C13 is a drawn scenario, that of C19 the contract's own."""
    right, *found = verdicts_of(RIGHT, *plant(WRONG_FIXES, tmp_path), scenarios=NUM_SCENARIOS, seed=SEED)
    assert names(right, "holds") == list(CONTRACTS)
    for (name, fault), verdicts in zip(WRONG_FIXES.items(), found, strict=True):
        assert fault.contract in names(verdicts, "broken"), name
        if fault.contract in ("C13", "C19"):
            row = verdicts[fault.contract]
            shown = run_python("-c", row["script"], PYTHONPATH=str(ROOT)).stderr
            assert f"Broken: {fault.contract}: {row['message']}" in shown


def test_target_that_ends_its_process_or_writes_is_a_finding_and_is_left_as_it_was(tmp_path: Path) -> None:
    paths = plant(HOSTILE, tmp_path)
    before = _contents(tmp_path)
    found = verdicts_of(*paths, scenarios=20, seed=SEED)
    assert [names(verdicts, "broken") for verdicts in found] == [["C16"]] * len(HOSTILE)
    assert all(verdicts["C34"]["verdict"] == "holds" for verdicts in found), "the other contracts are checked too"
    assert _contents(tmp_path) == before
    shown = run_python("-c", f"{found[0]['C16']['script']}print('goes on')", PYTHONPATH=str(ROOT))
    assert (shown.returncode, shown.stdout) == (0, ""), f"the script ends its process: {shown.stderr}"


def test_script_that_ends_its_process_loses_its_own_verdict_alone(tmp_path: Path) -> None:
    raises = 'raise ValueError(f"max_tokens'
    ends = Fault("C27", PARAMS, raises, f"__import__('os')._exit(3)\n            {raises}")
    (verdicts,) = verdicts_of(*plant({"": ends}, tmp_path), scenarios=5, seed=SEED)
    assert verdicts["C27"]["reason"] == "the target's process ended itself with exit code 3"
    assert all(verdicts[name]["verdict"] == "holds" for name in ("C19", "C26", "C28", "C32"))


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.campaign
@pytest.mark.parametrize("seed", LONG_SEEDS)
def test_right_target_is_clean_over_thousands_of_scenarios(seed: int) -> None:
    (verdicts,) = verdicts_of(RIGHT, scenarios=3000, seed=seed)
    assert names(verdicts, "holds") == list(CONTRACTS)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", LONG_SEEDS)
def test_planted_faults_are_named_with_other_seeds(seed: int, tmp_path: Path) -> None:
    found = verdicts_of(*plant(FAULTS, tmp_path), scenarios=400, seed=seed)
    wrong: dict[str, Any] = {
        name: names(verdicts, "broken")
        for (name, fault), verdicts in zip(FAULTS.items(), found, strict=True)
        if fault.contract not in names(verdicts, "broken")
        or not {fault.contract, *fault.also}.issuperset(names(verdicts, "broken"))
    }
    assert wrong == {}
