"""The registry of kernels: what tests/kernels/NAME_cases.py declares of nanovllm/kernels/NAME.py, as one object KERNEL.

The common tests (tests/kernels/test_kernels.py), compute-sanitizer's run and the benchmarks go over kernels(). They
find a new kernel by its file of cases; docs/adding_a_kernel.md shows one.
"""

import ast
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tests.support.source_tree import ROOT, parse

Check = Callable[[str], None]  # runs on a device, "cpu" if interpreted or "cuda", and raises AssertionError
Inputs = dict[str, Any]  # a launcher's arguments

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (capability, dtype) of a compilation: every dtype and every generation, float32 where kernels are tuned.
TARGETS = ((90, torch.float32), (90, torch.bfloat16), (80, torch.bfloat16), (100, torch.float16))


@dataclass(frozen=True)
class Limits:
    """What one compiled kernel may take: registers and bytes of stack of a thread, shared memory of a program."""

    max_registers: int = 255
    max_shared_bytes: int | None = None
    max_stack_bytes: int = 0


@dataclass(frozen=True)
class Compilation:
    """launch(dtype, capability): launches on meta tensors. also: what holds of each compiled kernel besides Limits."""

    launch: Callable[[torch.dtype, int], object]
    targets: tuple[tuple[int, torch.dtype], ...] = TARGETS
    also: Callable[[Any], None] = lambda compiled: None


@dataclass(frozen=True)
class Refused:
    """launch(**inputs()) is valid; with one of `changes` it must raise a ValueError whose text matches.

    changes: (changed inputs, regular expression). A changed input is a value, or a function of the valid one.
    """

    launch: Callable[..., object]
    inputs: Callable[[], Inputs]
    changes: tuple[tuple[Inputs, str], ...]


@dataclass(frozen=True)
class Steps:
    """launch(size) on meta tensors, where size changes from step to step (numbers of tokens, widths of block tables).

    max_variants: how many variants all sizes may take, or None if they are not counted. met_at_start: whether start-up
    launches with every variant that any number of tokens asks for.
    """

    launch: Callable[[int], object]
    max_variants: int | None = 1
    met_at_start: bool = False


@dataclass(frozen=True)
class Kernel:
    """One file of nanovllm/kernels.

    launched: its kernels, by the name of the @triton.jit function, and their limits.
    cases: small; run interpreted, on a GPU and under compute-sanitizer. on_gpu: more, for a GPU only.
    drawn: a Hypothesis strategy of checks, run on a GPU only. What it makes may depend on nothing but its draws.
    measured: benchmarks, NAME -> function of a point of benchmarks.shapes.POINTS[NAME], which gives a Measured.
    reached_by: the configuration, of reaching.CONFIGURATIONS, of an LLM that launches these kernels.
    beyond_contract: names of cases that check what this implementation promises beyond its launcher's contract, such as
        equal bits in another batch; they do not run on a callable given by --kernel.
    capability: of the only GPUs that it runs on.
    """

    name: str
    launched: Mapping[str, Limits]
    cases: dict[str, Check]
    compiled: Mapping[str, Compilation]
    drawn: Any
    refused: Refused | None
    measured: Mapping[str, Callable[..., Any]]
    reached_by: str = "llama"
    on_gpu: Mapping[str, Check] = field(default_factory=dict)
    steps: Mapping[str, Steps] = field(default_factory=dict)
    beyond_contract: frozenset[str] = frozenset()
    capability: tuple[int, int] | None = None

    @property
    def module(self) -> str:
        return f"tests.kernels.{self.name}_cases"

    @property
    def file(self) -> Path:
        return ROOT / "nanovllm" / "kernels" / f"{self.name}.py"

    @property
    def gpu_cases(self) -> dict[str, Check]:
        assert not self.cases.keys() & self.on_gpu.keys(), "two cases of one name"
        return {**self.cases, **self.on_gpu}


@dataclass(frozen=True)
class BoundCheck:
    """A check: function(device, *args, **kwargs). Its text is that of the call that made it."""

    function: Callable[..., None]
    args: tuple[Any, ...]
    kwargs: Inputs

    def __call__(self, device: str) -> None:
        self.function(device, *self.args, **self.kwargs)

    def __str__(self) -> str:
        words = [*map(str, self.args), *(f"{name}={value}" for name, value in self.kwargs.items())]
        return f"{self.function.__name__}({', '.join(words)})"


def case(function: Callable[..., None]) -> Callable[..., BoundCheck]:
    """Decorates function(device, ...): to call it without the device gives a check."""
    return lambda *args, **kwargs: BoundCheck(function, args, kwargs)


def each(make: Callable[..., Check], **axes: Iterable[Any]) -> dict[str, Check]:
    """make(**arguments) for every combination of values, by names such as "257 x 768, bfloat16, rows 2".

    A mapping gives its values names of their own.
    """
    checks = {}
    for combination in product(*(_named(axis, values) for axis, values in axes.items())):
        arguments = dict(zip(axes, (value for _, value in combination), strict=True))
        checks[", ".join(name for name, _ in combination)] = make(**arguments)
    return checks


def _named(axis: str, values: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    if isinstance(values, Mapping):
        return values.items()
    return [(_name(axis, value), value) for value in values]


def _name(axis: str, value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return " x ".join(map(str, value)) if isinstance(value, tuple) else f"{axis} {value}"


REPLACED: dict[str, Callable[..., Any]] = {}  # path of lazy() -> callable given by --kernel; see own_kernels.py


def lazy(path: str) -> Callable[..., Any]:
    """nanovllm.kernels' function `path`, such as "rms_norm.add_rms_norm".

    Imported when it is first called: at its import, triton decides whether it interprets. Calls go to the callable in
    REPLACED instead, if there is one.
    """
    module, _, name = path.rpartition(".")

    def call(*args: Any, **kwargs: Any) -> Any:
        if path in REPLACED:
            return REPLACED[path](*args, **kwargs)
        return getattr(importlib.import_module(f"nanovllm.kernels.{module}"), name)(*args, **kwargs)

    call.__name__ = name
    return call


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without contents, for what is compiled and not run."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launchers(kernel: Kernel) -> list[str]:
    """Paths, as lazy() takes them, of the kernel's launchers: the functions of its file that a benchmark measures."""
    functions = {node.name for node in parse(kernel.file).body if isinstance(node, ast.FunctionDef)}
    return [f"{kernel.name}.{name}" for name in kernel.measured if name in functions]


@cache
def kernels() -> dict[str, Kernel]:
    """Every registered kernel by its name."""
    names = sorted(path.stem for path in (ROOT / "tests" / "kernels").glob("*_cases.py"))
    found = [importlib.import_module(f"tests.kernels.{name}").KERNEL for name in names]
    return {kernel.name: kernel for kernel in found}
