"""The contracts of tests/conformance/engines: an engine that keeps them all is clean, each planted fault is found by its own.

The engines are small ones of our own (fakes/plain.py, fakes/faults.py), and two in the style of nano-vllm and of vLLM,
which prove those adapters without the packages.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.engines.adapters import ADAPTERS, NANO_VLLM, NANOVLLM, VLLM, Target
from tests.conformance.engines.contracts import CONTRACTS
from tests.conformance.engines.driver import Broken, NotApplicable
from tests.conformance.engines.fakes import faults
from tests.conformance.engines.fakes.faults import FAULTS, IsHeldUntilItIsClosed

PLAIN = "tests.conformance.engines.fakes.plain"
OPTIONS = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "num_blocks": 128, "block_size": 16}
PLAIN_ADAPTER = dataclasses.replace(
    NANOVLLM, options=OPTIONS, num_blocks="num_blocks", free_blocks="{}.num_free_blocks", events={}
)
FAKES = "tests.conformance.engines.fakes"


def plain(module: str, name: str) -> Target:
    return Target((module, name), (PLAIN, "SamplingParams"), PLAIN_ADAPTER)


def results(target: Target) -> dict[str, Any]:
    """Contract id -> Broken, or the reason why it does not apply; contracts that are kept are not in it."""
    found: dict[str, Any] = {}
    for contract in CONTRACTS:
        try:
            contract.check(target)
        except Broken as broken:
            found[contract.id] = broken
        except NotApplicable as reason:
            found[contract.id] = str(reason)
    return found


@pytest.fixture(autouse=True)
def _held() -> Iterator[None]:
    yield
    IsHeldUntilItIsClosed.held.clear()


def test_an_engine_that_keeps_every_contract_is_clean() -> None:
    assert results(plain(PLAIN, "PlainLLM")) == {}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_by_its_contract_and_no_other(fault: Any) -> None:
    found = results(plain(faults.__name__, fault.__name__))
    assert {id: str(broken) for id, broken in found.items()}.keys() == {fault.breaks}


def test_every_contract_has_a_fault() -> None:
    assert {fault.breaks for fault in FAULTS} == {contract.id for contract in CONTRACTS}
