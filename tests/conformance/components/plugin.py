"""Plugin: `pytest tests/conformance --target PATH` checks another checkout, and runs no test of this one."""

from pathlib import Path

import pytest

CONTRACT_TESTS = "tests/conformance/components/test_target.py::test_contract["


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "root of a checkout of nano-vllm or a fork, whose components are checked instead of this one's"
    parser.getgroup("nanovllm").addoption("--target", metavar="PATH", type=Path, help=text)


def pytest_configure(config: pytest.Config) -> None:
    target = config.option.target
    if target is not None and not target.is_dir():
        raise pytest.UsageError(
            f"--target {target} is no folder; give the root of a checkout of nano-vllm or of a fork"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.target is None:
        return
    others = [item for item in items if not item.nodeid.startswith(CONTRACT_TESTS)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item.nodeid.startswith(CONTRACT_TESTS)]
    if not items:
        raise pytest.UsageError("--target goes with the folder of its tests: pytest tests/conformance --target PATH")
