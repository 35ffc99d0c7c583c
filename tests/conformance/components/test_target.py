"""Every contract of this engine, or of the checkout that --target names."""

from typing import Any

import pytest

from tests.conformance.components.contracts import CONTRACTS
from tests.conformance.components.running import verdicts_of
from tests.support.source_tree import ROOT

SCENARIOS_HERE, SCENARIOS_OF_TARGET = 600, 1500  # the first comes to every check in every run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contract" in metafunc.fixturenames:
        metafunc.parametrize("contract", list(CONTRACTS) if metafunc.config.option.target else [])


@pytest.fixture(scope="module")
def verdicts(pytestconfig: pytest.Config) -> dict[str, Any]:
    seed = pytestconfig.option.hypothesis_seed
    path = pytestconfig.option.target.resolve()
    (result,) = verdicts_of(path, scenarios=SCENARIOS_OF_TARGET, seed=seed, seconds=90)
    return result


def test_contract(contract: str, verdicts: dict[str, Any]) -> None:
    row = verdicts[contract]
    if row["verdict"] == "not applicable":
        pytest.skip(f"not applicable: {row['reason']}")
    if row["verdict"] == "broken":
        rule = f"{contract}: {row['rule']}\n{row['message']}\nusers see: {row['users_see']}"
        pytest.fail(f"{rule}\n\n{row['script']}\n{row['picture']}", pytrace=False)


def test_this_engine_keeps_every_contract(pytestconfig: pytest.Config) -> None:
    """None is not applicable either."""
    (result,) = verdicts_of(ROOT, scenarios=SCENARIOS_HERE, seed=pytestconfig.option.hypothesis_seed)
    assert [row for row in result.values() if row["verdict"] != "holds"] == []
