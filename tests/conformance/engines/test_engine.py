"""The engine of --engine keeps every contract that applies to it. Ours is the default, and to it all apply."""

import pytest

from tests.conformance.engines.adapters import Target
from tests.conformance.engines.contracts import CONTRACTS, Contract, check_usable
from tests.conformance.engines.driver import Broken, NotApplicable
from tests.conformance.engines.plugin import NOT_APPLICABLE, TARGET
from tests.conformance.engines.reporting import explain, explain_unusable


@pytest.fixture(scope="session")
def target(pytestconfig: pytest.Config) -> Target:
    """The engine. A given one that cannot be constructed or called ends the run."""
    target = pytestconfig.stash[TARGET]
    if pytestconfig.option.engine is not None:
        try:
            check_usable(target)
        except Broken as broken:
            pytest.exit(explain_unusable(target, broken), returncode=pytest.ExitCode.USAGE_ERROR)
    return target


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.id)
def test_contract(contract: Contract, target: Target) -> None:
    try:
        contract.check(target)
        return
    except NotApplicable as reason:
        pytest.skip(f"{NOT_APPLICABLE}{reason}")
    except Broken as broken:
        explanation = explain(contract, target, broken)
    pytest.fail(explanation, pytrace=False)  # outside of `except`: pytest would print the exception too
