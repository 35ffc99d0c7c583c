"""Every @triton.jit function has an interpreter test, a compile test, a GPU test and a benchmark, or an exemption."""

import ast
from pathlib import Path

import pytest

from tests.kernels.coverage import DEMANDS, EXEMPTIONS, TESTED_THROUGH, Source, unmet_demands
from tests.source_tree import ROOT, parse, python_files

KERNEL_FILES = {path.stem: Source(parse(path)) for path in python_files("nanovllm/kernels")}
BENCHMARKS = [Source(parse(path)) for path in python_files("benchmarks/kernels")]


def source_if_there(path: Path) -> Source | None:
    return Source(parse(path)) if path.is_file() else None


def unmet_of_file(name: str) -> dict[str, list[str]]:
    tests = source_if_there(ROOT / "tests/kernels" / f"test_{name}.py")
    cases = source_if_there(ROOT / "tests/kernels" / f"{name}_cases.py")
    return dict(unmet_demands(KERNEL_FILES[name], tests, cases, BENCHMARKS))


@pytest.mark.parametrize("name", [name for name, source in KERNEL_FILES.items() if source.jit_functions()])
def test_every_kernel_is_tested_in_each_way(name):
    unmet = {
        (kernel, demand)
        for kernel, demands in unmet_of_file(name).items()
        for demand in demands
        if (kernel, demand) not in EXEMPTIONS
    }
    assert not unmet


@pytest.mark.parametrize("name", [name for name, source in KERNEL_FILES.items() if source.jit_functions()])
def test_every_device_function_is_tested_through_a_kernel_that_calls_it(name):
    source = KERNEL_FILES[name]
    kernels = source.jit_functions() & source.launched()
    tested_through = TESTED_THROUGH.get(name, {})
    for function in source.jit_functions() - kernels:
        assert function in tested_through, f"{name}.{function} is neither launched nor in TESTED_THROUGH"
        kernel = tested_through[function]
        assert kernel in kernels, f"{kernel} is no kernel of {name}.py"
        assert function in source.reached(kernel), f"{kernel} does not call {function}"


def test_exemptions_are_still_needed():
    unmet = {
        (kernel, demand)
        for name in KERNEL_FILES
        for kernel, demands in unmet_of_file(name).items()
        for demand in demands
    }
    assert EXEMPTIONS.keys() <= unmet
    for name, functions in TESTED_THROUGH.items():
        assert functions.keys() <= KERNEL_FILES[name].jit_functions()


# --- the search itself, on planted files ---

KERNEL = """
@triton.jit
def double_kernel(x): helper(x)
@triton.jit
def helper(x): pass
def _launch(x): double_kernel[(1,)](x)
def double(x): _launch(x)
def unrelated(x): pass
"""
TESTS = """
def launch(): return double(x)
def test_interpreted(): run_interpreted(cases.__name__)
def test_compiled(): compile_launches(launch)
@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name): cases.CHECKS[name]("cuda")
"""
CASES = """
def check(device): double(x)
CHECKS = {"first": other}
CHECKS |= {"second": check}
"""
BENCHMARK = """
def test_double(measure): measure(lambda: double(x))
"""


def unmet(kernel: str = KERNEL, tests: str = TESTS, cases: str = CASES, benchmark: str = BENCHMARK) -> list[str]:
    sources = [Source(ast.parse(text)) for text in (kernel, tests, cases, benchmark)]
    return unmet_demands(*sources[:3], sources[3:])["double_kernel"]


def test_a_kernel_with_all_four_lacks_nothing():
    assert unmet() == []


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"tests": TESTS.replace("run_interpreted", "print")}, ["interpreted"]),
        ({"cases": CASES.replace("double", "unrelated")}, ["interpreted", "on a GPU"]),
        ({"tests": TESTS.replace("compile_launches", "print")}, ["compiled"]),
        ({"tests": TESTS.replace("return double(x)", "return unrelated(x)")}, ["compiled"]),
        ({"tests": TESTS.replace("mark.gpu", "mark.slow")}, ["on a GPU"]),
        ({"benchmark": BENCHMARK.replace("double(x)", "unrelated(x)")}, ["measured"]),
        ({"benchmark": BENCHMARK.replace("measure", "benchmark")}, ["measured"]),
        ({"tests": "", "cases": "", "benchmark": ""}, list(DEMANDS)),
    ],
)
def test_what_is_lacking_is_noticed(change, lacking):
    assert unmet(**change) == lacking
