"""Plugin: `pytest tests/conformance --target PATH` checks another checkout instead of this one."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "root of a checkout of nano-vllm or a fork, whose components are checked (default: this one)"
    parser.getgroup("nanovllm").addoption("--target", metavar="PATH", type=Path, help=text)
