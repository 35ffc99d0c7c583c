"""What keeps the suite honest: every file is collected, every test can fail, and the run is strict."""

import re
import textwrap
from pathlib import Path

import pytest

from tests.asserting import can_fail, collected_tests, files_of_tests, misplaced_tests
from tests.limits import HANG_SECONDS
from tests.source_tree import ROOT, python_files

# Tests that say what is accepted, beside one that says what is refused: they fail when there is an error.
ACCEPTING = {
    "unit/test_benchmark_regression.py": {"test_the_same_gpu_with_other_versions_is_compared"},
    "unit/test_models.py": {
        "test_heads_that_can_be_shared_or_replicated_are_accepted",
        "test_dense_size_matters_only_if_a_layer_is_dense",
    },
    "unit/test_validation.py": {
        "test_require_int_takes_both_ends",
        "test_require_number_takes_python_and_numpy_numbers",
    },
}


def named(path: Path) -> str:
    return path.relative_to(ROOT / "tests").as_posix()


def test_every_test_can_fail() -> None:
    found = {
        named(path): {name for name, test in collected_tests(path).items() if not can_fail(path, test)}
        for path in files_of_tests()
    }
    assert {path: names for path, names in found.items() if names} == ACCEPTING


def test_every_file_of_tests_has_tests() -> None:
    assert [named(path) for path in files_of_tests() if not collected_tests(path)] == []


def test_no_test_is_where_pytest_does_not_look() -> None:
    """In a file that is not named test_*.py, inside of another function, or hidden by one of the same name."""
    found = {named(path): misplaced_tests(path) for path in python_files("tests")}
    # --replay FILE collects this one, and nothing else does: it needs a file.
    assert {path: names for path, names in found.items() if names} == {"replay/replay_file.py": ["test_replay"]}


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


SAMPLES = {
    "can fail": """
        from tests.asserting import files_of_tests
        from tests.oracle import Oracle
        import pytest, torch
        def helper(x): assert x
        def outer(x): helper(x)
        class Checker:
            def check(self): assert self
            def look(self): pass
        class Machine:
            @rule()
            def step(self): assert self
        class Child(Machine): pass
        CHECKS = {"one": helper}
        TestMachine = Child.TestCase
        def test_directly(): assert 1
        def test_raises():
            with pytest.raises(ValueError): int("x")
        def test_helper(): outer(1)
        def test_method(): Checker().check()
        def test_method_of_an_import(oracle): oracle.check(Oracle)
        def test_table(): CHECKS["one"](1)
        def test_library(): torch.testing.assert_close(1, 1)
        @pytest.mark.parametrize("check", [helper])
        def test_parameter(check): check(1)
        class TestClass:
            def test_inside(self): outer(1)
    """,
    "cannot": """
        from tests.asserting import files_of_tests
        def assert_nothing(x): print(x)
        class Checker:
            def check(self): assert self
            def look(self): pass
        def test_nothing(): pass
        def test_name_that_promises(): assert_nothing(1)
        def test_call(): files_of_tests()
        def test_other_method(): Checker().look()
        def test_comparison_without_assert(): 1 == 2
        def test_other_errors():
            if not 1: raise ValueError
    """,
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_search_for_assertions_tells_them_apart(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "test_sample.py"
    path.write_text(textwrap.dedent(SAMPLES[kind]))
    tests = collected_tests(path)
    assert len(tests) == SAMPLES[kind].count("def test_") + SAMPLES[kind].count("TestMachine =")
    able = {name for name, test in tests.items() if can_fail(path, test)}
    assert able == (set(tests) if kind == "can fail" else set())


def test_a_hidden_an_inner_and_a_misnamed_test_are_found(tmp_path: Path) -> None:
    text = "def test_a(): pass\ndef test_a(): pass\ndef f():\n    def test_b(): pass\n"
    (tmp_path / "test_x.py").write_text(text)
    (tmp_path / "x_test.py").write_text("def test_c(): pass\n")
    assert misplaced_tests(tmp_path / "test_x.py") == ["test_a", "test_b"]
    assert misplaced_tests(tmp_path / "x_test.py") == ["test_c"]
