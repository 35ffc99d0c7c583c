"""Every registered kernel in every common way: interpreted, compiled, refusing, on a GPU, launched by an LLM.

What a kernel declares is in NAME_cases.py; docs/adding_a_kernel.md shows how one is added.
It is one file, so that all that a kernel must keep stands in one place.
"""

import ast
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings

pytest.importorskip("triton")

from benchmarks.shapes import POINTS
from nanovllm.worker.warmup import prefill_warmup_shapes
from tests.support.counts import count_comparisons
from tests.support.kernels.accuracy import assert_repeats
from tests.support.kernels.compiling import assert_fits, compile_launches, compile_own_launches, variants_of_launches
from tests.support.kernels.interpreting import INTERPRETER, failure_of
from tests.support.kernels.own_kernels import NotJudged, sources
from tests.support.kernels.reaching import kernels_of_interpreted_llm, kernels_of_llm_on_a_gpu
from tests.support.kernels.registry import Check, Kernel, Limits, kernels
from tests.support.kernels.versions import INTERPRETER_REASON, interprets
from tests.support.source_tree import parse, python_files

KERNELS = kernels()
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
ANY_THAT_CAN_BE_LAUNCHED = Limits(max_stack_bytes=2**62)
NEEDS_INTERPRETER = pytest.mark.skipif(not interprets(), reason=INTERPRETER_REASON)


def each(attribute: str) -> pytest.MarkDecorator:
    """The test once for each entry of a mapping that kernels declare: kernel, and the entry's name."""
    entries = [(kernel, name) for kernel in KERNELS.values() for name in getattr(kernel, attribute)]
    ids = [f"{kernel.name}-{name}" for kernel, name in entries]
    return pytest.mark.parametrize(("kernel", "name"), entries, ids=ids)


def report(kernel: Kernel, name: str, failure: str) -> None:
    """Fail the test with `failure`, unless that is empty. The command that repeats the test follows in its report."""
    if failure:
        pytest.fail(f"kernel {kernel.name}{sources(kernel.name)}, case {name!r}: {failure}", pytrace=False)


# --- interpreted ---


@NEEDS_INTERPRETER
@pytest.mark.own_kernel
@each("cases")
def test_interpreted(kernel: Kernel, name: str) -> None:
    """D50, D51, D52, D53, D56, D57, D58: each case in two orders of the grid's programs, between guard margins."""
    outcome = INTERPRETER.run(kernel.module, name)
    report(kernel, name, outcome.failure)
    if outcome.not_judged:
        pytest.skip(outcome.not_judged)


@NEEDS_INTERPRETER
@EACH_KERNEL
def test_every_function_of_the_file_runs_in_its_cases(kernel: Kernel) -> None:
    """A @triton.jit function that no case reaches would be tested by nothing."""
    missing = set(jit_functions(kernel))
    for name in sorted(kernel.cases, key=lambda name: "far" in name):
        if not missing:
            break
        missing -= INTERPRETER.run(kernel.module, name).functions
    assert not missing


def jit_functions(kernel: Kernel) -> list[str]:
    """Names of the functions in the kernel's file that a `jit` decorates."""
    functions = [node for node in parse(kernel.file).body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if any("jit" in ast.unparse(mark) for mark in node.decorator_list)]


def test_every_file_with_kernels_is_registered() -> None:
    launched = re.compile(r"^def \w+_kernel\(", re.MULTILINE)  # other jitted functions are parts of kernels
    texts = {path.stem: path.read_text(encoding="utf-8") for path in python_files("nanovllm/kernels")}
    files = {name for name, text in texts.items() if launched.search(text)}
    assert set(KERNELS) == files


# --- compiled ---


def compilations() -> Iterator[Any]:
    for kernel in KERNELS.values():
        for name, compilation in kernel.compiled.items():
            for capability, dtype in compilation.targets:
                target = f"sm_{capability}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(kernel, name, capability, dtype, id=f"{kernel.name}-{name}-{target}")


@pytest.mark.own_kernel
@pytest.mark.parametrize(("kernel", "name", "capability", "dtype"), list(compilations()))
def test_compiled(kernel: Kernel, name: str, capability: int, dtype: Any) -> None:
    """For a GPU that need not be there: within its declared limits of registers, shared memory and stack.

    What --kernel gives must be possible to launch.
    """
    compilation = kernel.compiled[name]
    if sources(kernel.name):
        try:
            all_compiled = compile_own_launches(lambda: compilation.launch(dtype, capability), capability, kernel.name)
        except NotJudged as reason:
            pytest.skip(str(reason))
        for compiled in all_compiled:
            assert_fits(compiled, ANY_THAT_CAN_BE_LAUNCHED)
        return
    own = [
        compiled
        for compiled in compile_launches(lambda: compilation.launch(dtype, capability), capability)
        if compiled.file == kernel.name
    ]
    assert own
    for compiled in own:
        assert_fits(compiled, kernel.launched[compiled.name])
        compilation.also(compiled)


@EACH_KERNEL
def test_every_launched_kernel_is_compiled(kernel: Kernel) -> None:
    names = set()
    for compilation in kernel.compiled.values():
        capability, dtype = compilation.targets[0]
        variants = variants_of_launches(lambda c=compilation, d=dtype, sm=capability: c.launch(d, sm))
        names |= {name for name, _ in variants}
    calls = (node for node in ast.walk(parse(kernel.file)) if isinstance(node, ast.Call))
    launched = {ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "launch"}
    assert set(kernel.launched) == launched & set(jit_functions(kernel)) == names & set(jit_functions(kernel))


# --- refused ---


def refusals() -> Iterator[Any]:
    for kernel in KERNELS.values():
        for number, (changes, message) in enumerate(kernel.refused.changes if kernel.refused else ()):
            yield pytest.param(kernel, changes, message, id=f"{kernel.name}-{number}-{'-'.join(changes)}")


@pytest.mark.parametrize(("kernel", "changes", "message"), list(refusals()))
def test_inputs_are_refused(kernel: Kernel, changes: dict[str, Any], message: str) -> None:
    """Shapes, strides and dtypes that the contract excludes raise ValueError."""
    inputs = kernel.refused.inputs()
    for name, change in changes.items():
        inputs[name] = change(inputs[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        kernel.refused.launch(**inputs)


# --- steps of other sizes ---

SIZES = (1, 2, 3, 15, 16, 17, 48, 250, 256, 1000)
# Numbers of tokens: those of start-up's prefills, and others, which any step may have.
MET_AT_START = tuple({sum(query_lens) for query_lens, _ in prefill_warmup_shapes(16384, 4096, 512, 100, 256)})
ANY = (3, 5, 7, 9, 15, 17, 31, 100, 140, 240, 255, 257, 700, 960, 1023, 1025, 3000, 4095, 4097, 12345, 16383)


@each("steps")
def test_another_size_compiles_nothing_new(kernel: Kernel, name: str) -> None:
    """A variant takes a second to compile, and a request would wait for it.

    Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, and for an address that is a multiple of
    16. So a kernel must not look at integers that change from step to step: numbers of tokens, widths of block tables.
    What a launcher chooses by size (tiles, warps) makes variants too, and those are declared.
    """
    steps = kernel.steps[name]
    if steps.max_variants is not None:
        variants = set(variants_of_launches(lambda: [steps.launch(size) for size in SIZES]))
        assert len(variants) <= steps.max_variants, sorted(kernel for kernel, _ in variants)
        count_comparisons("kernels: variants of a step's sizes", len(SIZES))
    if steps.met_at_start:
        variants = variants_of_launches(lambda: [steps.launch(size) for size in (*MET_AT_START, *ANY)])
        num_met = len(MET_AT_START) * (len(variants) // len(MET_AT_START + ANY))  # a launch launches as many kernels
        assert set(variants[num_met:]) <= set(variants[:num_met])
        count_comparisons("kernels: variants of a step's sizes", len(ANY))


# --- reached by an LLM ---


def configurations() -> Iterator[Any]:
    """An LLM's configuration, and the kernels that it must launch. The test's id has the names of all."""
    for configuration in sorted({kernel.reached_by for kernel in KERNELS.values()}):
        reached = [kernel for kernel in KERNELS.values() if kernel.reached_by == configuration]
        yield pytest.param(configuration, reached, id="-".join([configuration, *(kernel.name for kernel in reached)]))


EACH_CONFIGURATION = pytest.mark.parametrize(("configuration", "reached"), list(configurations()))


@NEEDS_INTERPRETER
@EACH_CONFIGURATION
def test_an_llm_launches_it(configuration: str, reached: list[Kernel]) -> None:
    """Without a GPU: an LLM of tiny weights on the CPU that is constructed with interpreted kernels."""
    names = kernels_of_interpreted_llm(configuration)
    assert_reached(reached, names, is_expected=lambda kernel: kernel.capability is None)


@pytest.mark.gpu
@EACH_CONFIGURATION
def test_an_llm_launches_it_on_a_gpu(configuration: str, reached: list[Kernel]) -> None:
    if configuration == "flash_attn":
        pytest.importorskip("flash_attn")
    assert_reached(reached, kernels_of_llm_on_a_gpu(configuration), is_expected=is_for_this_gpu)


def assert_reached(reached: list[Kernel], names: frozenset[str], is_expected: Callable[[Kernel], bool]) -> None:
    """Every kernel that a file launches is among `names`, or none of a file that is for another GPU."""
    for kernel in reached:
        launched = names & set(kernel.launched)
        assert launched == (set(kernel.launched) if is_expected(kernel) else set()), kernel.name


# --- on a GPU ---


def is_for_this_gpu(kernel: Kernel) -> bool:
    return kernel.capability in (None, torch.cuda.get_device_capability())


@pytest.fixture
def device(kernel: Kernel) -> str:
    """ "cuda"; skips the test if the kernel is for another GPU."""
    if not is_for_this_gpu(kernel):
        pytest.skip("needs compute capability {}.{}".format(*kernel.capability))
    return "cuda"


@pytest.mark.gpu
@pytest.mark.own_kernel
@each("gpu_cases")
def test_on_a_gpu(kernel: Kernel, name: str, device: str) -> None:
    """D07, D50, D51, D52, D53, D56, D57, D58: the interpreted cases, real sizes, all dtypes, CUDA graphs."""
    try:
        report(kernel, name, failure_of(kernel.gpu_cases[name], device))
    except NotJudged as reason:
        pytest.skip(str(reason))


def drawn_checks(kernel: Kernel) -> list[Check]:
    """What Hypothesis draws of kernel.drawn with the run's seed.

    All are drawn before one runs: nothing that a kernel, its compiler or a GPU does can change what is drawn.
    """
    checks: list[Check] = []

    @settings(max_examples=30, database=None, phases=[Phase.generate])  # nearly each of them compiles
    @given(check=kernel.drawn)
    def collect(check: Check) -> None:
        checks.append(check)

    collect()
    return checks


@EACH_KERNEL
def test_draws_depend_on_the_seed_alone(kernel: Kernel) -> None:
    """Else a failure could not be repeated, and Hypothesis reports a FlakyStrategyDefinition."""
    torch.manual_seed(1)
    first = [str(check) for check in drawn_checks(kernel)]
    torch.manual_seed(2)
    assert [str(check) for check in drawn_checks(kernel)] == first
    assert len(set(first)) > 10


@pytest.mark.gpu
@pytest.mark.own_kernel
@EACH_KERNEL
def test_drawn_on_a_gpu(kernel: Kernel, device: str) -> None:
    """Shapes, dtypes and options that Hypothesis draws."""
    reasons, checks = [], drawn_checks(kernel)
    for check in checks:
        try:
            report(kernel, "drawn", failure_of(check, device))
        except NotJudged as reason:
            reasons.append(str(reason))
    if len(reasons) == len(checks):
        pytest.skip(reasons[0])


@pytest.mark.gpu
@each("measured")
@pytest.mark.usefixtures("device")
def test_repeats_itself_on_a_gpu(kernel: Kernel, name: str) -> None:
    """Fifty runs of every third point of a benchmark give the same bits."""
    for point in [*POINTS[name].values()][::3]:
        measured = kernel.measured[name](*point)
        inputs = measured.make(0)
        assert_repeats(lambda run=measured.run, inputs=inputs: run(*inputs))


# --- measured ---


def test_every_benchmark_has_points_and_every_kernel_a_benchmark() -> None:
    declared = [name for kernel in KERNELS.values() for name in kernel.measured]
    assert all(kernel.measured for kernel in KERNELS.values())
    assert sorted(declared) == sorted(POINTS)
