"""Callables given by `--kernel NAME=SOURCE`, which take the place of our launchers in cases and benchmarks.

NAME: a launcher, such as paged_attention or add_rms_norm. SOURCE: package.module:function, path/to/file.py:function, or
path/to/solution.json, a Solution or Definition of FlashInfer-Trace (trace_solutions.py). docs/own_kernels.md: examples.

A callable is called with our launcher's parameters, by name. What only says how to compute (tile sizes, numbers of
splits) is left out if it has no such parameter. adapters.py adapts signatures of FlashInfer, flash-attn and vLLM.
A callable raises NotImplementedError for inputs that it does not support: that case is skipped and judges nothing.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.kernels import adapters, layer_adapters, sized_cases, trace_solutions
from tests.support.kernels.registry import REPLACED, kernels, launchers

NOT_JUDGED = "not judged"  # how the reason of such a skip begins
ORDER_HINTS = {"sequence_order"}  # tensors that say in which order to compute, and change no result
HINT_TYPES = {"int", "float", "bool", "None", "TileConfig"}
RESULT_OPTIONS = {"returns_key"}  # keyword-only parameters of those types that do change the result


class NotJudged(Exception):
    """A case says nothing about the callable: the callable does not support its inputs, or was not called."""


@dataclass
class OwnKernel:
    """A callable in the place of the launcher `path`. spec: as --kernel was given.

    function: with the launcher's parameters. raw: as it was loaded, before it was adapted.
    """

    path: str
    spec: str
    raw: Callable[..., Any]
    function: Callable[..., Any]
    ours: inspect.Signature
    num_calls: int = 0

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def source(self) -> str:
        return self.spec.partition("=")[2]

    def call_raw(self, **inputs: Any) -> Any:
        """Its own signature, for cases that our launcher's does not fit."""
        self.num_calls += 1
        return self.raw(**inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        given = self.ours.bind(*args, **kwargs).arguments
        names, takes_any = _names(self.function)
        self._give_defaults(given, names)
        for name in [name for name in given if name not in names and not takes_any]:
            parameter, value = self.ours.parameters[name], given.pop(name)
            if not _is_hint(parameter) and value is not parameter.default:
                raise NotJudged(f"{NOT_JUDGED}: {self.source} has no parameter {name}, and the case gives it")
        try:
            return self.function(**given)
        except NotImplementedError as error:
            raise NotJudged(f"{NOT_JUDGED}: {self.source} does not support the inputs: {error}") from error

    def _give_defaults(self, given: dict[str, Any], names: set[str]) -> None:
        """Our defaults for what the callable requires and the call leaves out. scale is a number, never None."""
        if "scale" in self.ours.parameters:
            usual = given["query"].shape[-1] ** -0.5
            if given.get("scale") in (None, usual):
                given.pop("scale", None)
                given |= {"scale": usual} if "scale" in names else {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.default is parameter.empty and name in self.ours.parameters and name not in given:
                given[name] = self.ours.parameters[name].default


def install(specs: Sequence[str]) -> None:
    """Replace the launchers that `specs` name, NAME=SOURCE each, and no others. Raises ValueError for a wrong one."""
    if tuple(specs) == installed_specs():
        return
    REPLACED.clear()
    for kernel in kernels().values():
        kernel.cases.pop(sized_cases.NAME, None)
    for spec in specs:
        own = load(spec)
        if own.path in REPLACED:
            raise ValueError(f"--kernel {spec}: {own.name} is given twice; give one callable for each kernel")
        REPLACED[own.path] = own
        if isinstance(own.raw, trace_solutions.TraceFunction):
            case = sized_cases.sized_case(own.name, own.raw)
            if case is not None:
                kernels()[own.path.partition(".")[0]].cases[sized_cases.NAME] = case


def installed() -> list[OwnKernel]:
    return [own for own in REPLACED.values() if isinstance(own, OwnKernel)]


def installed_specs() -> tuple[str, ...]:
    return tuple(own.spec for own in installed())


def sources(kernel_name: str) -> str:
    """ " by SOURCE", for messages about a kernel of the registry; "" if our launchers are called."""
    found = [own.source for own in installed() if own.path.startswith(f"{kernel_name}.")]
    return f" by {' and '.join(found)}" if found else ""


@contextmanager
def without_own_kernels() -> Iterator[None]:
    """Within it, lazy() calls our launchers again."""
    replaced = dict(REPLACED)
    REPLACED.clear()
    try:
        yield
    finally:
        REPLACED.update(replaced)


@contextmanager
def must_be_called() -> Iterator[None]:
    """Raises NotJudged at its end if callables are installed and none was called within it."""
    before = [own.num_calls for own in installed()]
    yield
    if before and before == [own.num_calls for own in installed()]:
        raise NotJudged(f"{NOT_JUDGED}: the case does not call the given callable")


# --- loading ---


def load(spec: str) -> OwnKernel:
    """What --kernel NAME=SOURCE names, checked. Raises ValueError with the name, the rule and the remedy."""
    name, equals, source = spec.partition("=")
    paths = {path.rpartition(".")[2]: path for kernel in kernels().values() for path in launchers(kernel)}
    if not equals or not source:
        raise ValueError(f"--kernel {spec}: must be NAME=SOURCE, such as {next(iter(paths))}=my_package.my_module:run")
    if name not in paths:
        raise ValueError(f"--kernel {spec}: there is no kernel {name!r}; the kernels are {', '.join(sorted(paths))}")
    try:
        function = _find(source)
        ours = signature_of(paths[name])
        adapted = layer_adapters.adapt(name, adapters.adapt(name, function))
        _check_signature(name, adapted, ours)
    except ValueError as error:
        raise ValueError(f"--kernel {spec}: {error}") from error
    return OwnKernel(paths[name], spec, function, adapted, ours)


def signature_of(path: str) -> inspect.Signature:
    """The signature of our launcher `path`."""
    module, _, name = path.rpartition(".")
    return inspect.signature(getattr(importlib.import_module(f"nanovllm.kernels.{module}"), name))


def _find(source: str) -> Any:
    if source.endswith(".json"):
        return trace_solutions.load(Path(source))
    place, colon, attribute = source.rpartition(":")
    if not colon:
        raise ValueError("SOURCE must be package.module:function, path/to/file.py:function or path/to/solution.json")
    function: Any = import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise ValueError(f"{place} has no {attribute!r}; it has {_public_callables(function)}")
        function = getattr(function, part)
    if type(function).__module__.startswith("triton."):
        raise ValueError(f"{attribute} is a Triton kernel; give the function that launches it")
    if not callable(function):
        raise ValueError(f"{attribute} is not callable: it is of type {type(function).__name__}")
    return function


def _import_module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `pytest`, other than `python -m pytest`, leaves it out
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever its top level raises
        raise ValueError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def import_file(path: Path) -> Any:
    """The file as a module of its own, whose folder can be imported from."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    path = path.resolve()
    name = f"own_kernel_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    return module


def _public_callables(module: Any) -> str:
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    return ", ".join(names) or "no public function"


# --- signatures ---


def _names(function: Callable[..., Any]) -> tuple[set[str], bool]:
    """Names that the function can be called with, and whether it takes any name."""
    parameters = inspect.signature(function).parameters.values()
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return named, any(one.kind is one.VAR_KEYWORD for one in parameters)


def _is_hint(parameter: inspect.Parameter) -> bool:
    """Whether the parameter of our launcher says only how to compute. A wrong answer cannot let a wrong result pass."""
    types = {part.rpartition(".")[2].strip() for part in _annotation(parameter).split("|")}
    is_plain = types <= HINT_TYPES and parameter.name not in RESULT_OPTIONS
    return parameter.kind is parameter.KEYWORD_ONLY and (is_plain or parameter.name in ORDER_HINTS)


def _annotation(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _check_signature(name: str, function: Callable[..., Any], ours: inspect.Signature) -> None:
    call = f"{name}({', '.join(ours.parameters)})"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"it has no signature that Python can read; wrap it in a function {call}") from None
    names, takes_any = _names(function)
    own = f"it has the parameters ({', '.join(map(str, parameters))})"
    remedy = f"name them as in {call}, or wrap it in such a function; {adapters.SIGNATURES}"
    is_required = [one for one in parameters if one.default is one.empty and one.kind not in (2, 4)]
    unknown = [one.name for one in is_required if one.kind is one.POSITIONAL_ONLY or one.name not in ours.parameters]
    if unknown:
        raise ValueError(f"{own}, and {', '.join(unknown)} would not be given: {remedy}")
    needed = [one.name for one in ours.parameters.values() if one.default is one.empty and not _is_hint(one)]
    missing = [one for one in needed if one not in names and not takes_any]
    if missing:
        raise ValueError(f"{own}, and lacks {', '.join(missing)}: {remedy}")
