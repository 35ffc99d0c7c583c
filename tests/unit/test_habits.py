"""What keeps the suite honest: every test is collected, the run is strict, and other machines cannot be reached."""

import ast
import re
import socket
from pathlib import Path

import pytest

from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT, parse, python_files

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def misplaced_tests(path: Path) -> list[str]:
    """Functions named test_* that pytest does not collect: in a file of another name, or inside a function."""
    tree = parse(path)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    collected = [node for place in (tree, *classes) for node in place.body if path.name.startswith("test_")]
    tests = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and node.name.startswith("test_")]
    return sorted(node.name for node in tests if node not in collected)


def test_no_test_is_where_pytest_does_not_look() -> None:
    """A second test of the same name is found by ruff (F811)."""
    found = {str(path.relative_to(ROOT)): misplaced_tests(path) for path in python_files("tests")}
    assert {path: names for path, names in found.items() if names} == {}


def test_an_inner_and_a_misnamed_test_are_found(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_a(): pass\ndef f():\n    def test_b(): pass\n")
    (tmp_path / "x_test.py").write_text("def test_c(): pass\n")
    assert misplaced_tests(tmp_path / "test_x.py") == ["test_b"]
    assert misplaced_tests(tmp_path / "x_test.py") == ["test_c"]


def test_every_marker_that_is_left_out_has_a_run_of_its_own(pytestconfig: pytest.Config) -> None:
    """What the default run leaves out is what some `-m MARKER` runs: the left out markers are those that are listed."""
    addopts = pytestconfig.getini("addopts")
    left_out = {word for word in addopts[addopts.index("-m") + 1].split() if word not in {"not", "and"}}
    assert left_out == set(re.findall(r"run with -m (\w+)", "\n".join(pytestconfig.getini("markers"))))


def test_the_run_is_strict(pytestconfig: pytest.Config) -> None:
    assert {"--strict-markers", "--strict-config"} <= set(pytestconfig.getini("addopts"))
    assert pytestconfig.getini("filterwarnings")[0] == "error"
    assert pytestconfig.getini("xfail_strict") is True
    assert HANG_SECONDS < float(pytestconfig.getini("timeout")) <= 3600  # so the reason is printed, not just the stack
    assert not pytestconfig.pluginmanager.has_plugin("rerunfailures"), "a failure is not run again until it passes"


def test_a_connection_to_another_machine_is_refused(pytestconfig: pytest.Config) -> None:
    is_guarded = pytestconfig.pluginmanager.hasplugin("socket")
    header = pytestconfig.hook.pytest_report_header(config=pytestconfig, start_path=pytestconfig.rootpath)
    assert any("no pytest-socket" in str(lines) for lines in header) != is_guarded
    if is_guarded:
        # The plugin warns before it raises, and warnings are errors. RFC 5737: an address of no machine.
        with socket.socket() as client, pytest.raises((RuntimeError, UserWarning), match=r"192\.0\.2\.1"):
            client.connect(("192.0.2.1", 9))
