"""The contracts of tests/conformance/engines: a right engine is clean, and each planted fault is found by its contract.

The engines are small ones of our own: fakes/plain.py and faults.py, and two in the styles of nano-vllm and of vLLM,
which prove these adapters without the packages.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.engines.adapters import NANO_VLLM, NANOVLLM, VLLM, Target
from tests.conformance.engines.contracts import CONTRACTS
from tests.conformance.engines.driver import Broken, NotApplicable
from tests.conformance.engines.fakes import faults, nano_vllm_like, plain, vllm_like
from tests.conformance.engines.fakes.faults import FAULTS, IsHeldUntilItIsClosed
from tests.conformance.engines.reporting import as_program
from tests.conformance.engines.resources import Watching
from tests.support.source_tree import ROOT

PLAIN_ADAPTER = dataclasses.replace(
    NANOVLLM,
    options={"max_model_len": 1024, "max_num_batched_tokens": 1024, "num_blocks": 128, "block_size": 16},
    num_blocks="num_blocks",
    free_blocks="{}.num_free_blocks",
    events={},
)
DOCUMENT = ROOT / "docs" / "conformance_engines.md"


def target_of(module: Any, name: str, adapter: Any) -> Target:
    params = plain if adapter is PLAIN_ADAPTER else module
    return Target((module.__name__, name), (params.__name__, "SamplingParams"), adapter)


def results(target: Target) -> dict[str, Any]:
    """Contract id -> Broken, or the reason why it does not apply. Contracts that are kept are left out."""
    found: dict[str, Any] = {}
    for contract in CONTRACTS:
        try:
            contract.check(target)
        except Broken as broken:
            found[contract.id] = broken
        except NotApplicable as reason:
            found[contract.id] = str(reason)
    return found


def script_error(script: str) -> str:
    """What a script raises as a program; empty if nothing."""
    try:
        exec(as_program(script), {"__name__": "__main__"})
    except Exception as error:
        return repr(error)
    finally:
        for watching in [*Watching.running]:  # a program that ends need not stop it
            watching.stop()
    return ""


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    yield
    IsHeldUntilItIsClosed.held.clear()


def test_an_engine_that_keeps_every_contract_is_clean() -> None:
    assert results(target_of(plain, "PlainLLM", PLAIN_ADAPTER)) == {}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_by_its_contract_and_no_other_and_its_script_shows_it(fault: Any) -> None:
    found = results(target_of(faults, fault.__name__, PLAIN_ADAPTER))
    assert [*found] == [fault.breaks], found
    script = found[fault.breaks].script
    assert script_error(script) != ""
    assert script_error(re.sub(rf"\b{fault.__name__}\b", "PlainLLM", script)) == "", "it fails without the fault too"


def test_outputs_in_reverse_are_not_reversed_twice() -> None:
    assert "E02" in results(target_of(faults, "OutputsInReverse", PLAIN_ADAPTER))


def test_every_contract_has_a_fault() -> None:
    assert {fault.breaks for fault in FAULTS} == {contract.id for contract in CONTRACTS}


@pytest.mark.parametrize(("module", "adapter"), [(nano_vllm_like, NANO_VLLM), (vllm_like, VLLM)], ids=["nano", "vllm"])
def test_an_engine_of_another_style_keeps_what_applies_to_it(module: Any, adapter: Any) -> None:
    expected = {
        contract.id: "; ".join(adapter.lacks[word] for word in contract.needs)
        for contract in CONTRACTS
        if adapter.lacks.keys() & set(contract.needs)
    }
    assert results(target_of(module, "LLM", adapter)) == expected


def test_a_fork_with_more_sampling_parameters_is_held_to_more() -> None:
    fitted = NANO_VLLM.fitted(["temperature", "max_tokens", "ignore_eos", "seed"])
    assert NANO_VLLM.lacks.keys() - fitted.lacks.keys() == {"seed"}


def test_the_document_has_a_row_of_each_contract() -> None:
    rows = re.findall(r"^\| (E\d+) \| (.*) \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(contract.id, contract.sentence, contract.users_see) for contract in CONTRACTS]
