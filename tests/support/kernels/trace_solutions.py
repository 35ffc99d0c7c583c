"""Definitions and Solutions of FlashInfer-Trace as callables, with the parameters that the Definition names.

A Definition is called by its reference, a Solution in Python or Triton by its entry point. Inputs of other sizes or
dtypes than the Definition states raise NotImplementedError. The package flashinfer-bench has the format's models; it is
not needed here.
"""

import atexit
import hashlib
import importlib
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

LANGUAGES = ("python", "triton")
FLOATS = ("float64", "float32", "float16", "bfloat16")


class TraceFunction:
    """A function with the signature of a Definition. given: what it calls, inputs in the Definition's order.

    is_destination_passing: it gets the outputs as further arguments, and writes them.
    """

    def __init__(self, definition: Mapping[str, Any], given: Callable[..., Any], is_destination_passing: bool) -> None:
        self.definition, self.given, self.is_destination_passing = definition, given, is_destination_passing
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in definition["inputs"]])
        self.__module__ = "flashinfer_trace"

    @property
    def constants(self) -> dict[str, int]:
        axes = self.definition["axes"].items()
        return {name: axis["value"] for name, axis in axes if axis["type"] == "const"}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first input that is a tensor of floats; float32 if none is."""
        specs = [spec for spec in self.definition["inputs"].values() if spec["shape"] and spec["dtype"] in FLOATS]
        return getattr(torch, specs[0]["dtype"]) if specs else torch.float32

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.__signature__.bind(*args, **kwargs).arguments
        sizes = self._sizes(inputs)
        if not self.is_destination_passing:
            return self.given(*inputs.values())
        device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        outputs = tuple(
            torch.empty(
                [sizes[axis] for axis in spec["shape"] or ()], dtype=getattr(torch, spec["dtype"]), device=device
            )
            for spec in self.definition["outputs"].values()
        )
        self.given(*inputs.values(), *outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _sizes(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """The size of every axis. Raises NotImplementedError where the inputs are not those of the Definition."""
        sizes = self.constants
        for name, value in inputs.items():
            spec = self.definition["inputs"][name]
            if not isinstance(value, torch.Tensor) or spec["shape"] is None:
                continue
            if str(value.dtype) != f"torch.{spec['dtype']}":
                raise NotImplementedError(f"its definition has {name} in {spec['dtype']}")
            if value.dim() != len(spec["shape"]):
                raise NotImplementedError(f"its definition has {name} as {spec['shape']}")
            for axis, size in zip(spec["shape"], value.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise NotImplementedError(f"its definition has {axis} = {sizes[axis]}")
        return sizes


def load(path: Path) -> TraceFunction:
    """The callable of a Definition or a Solution. Raises ValueError if it is neither, or cannot be loaded."""
    content = _read(path)
    if "reference" in content:
        return TraceFunction(content, _reference(content), is_destination_passing=False)
    missing = [key for key in ("definition", "spec", "sources") if key not in content]
    if missing:
        raise ValueError(
            f"{path} is no Definition (it lacks reference) and no Solution (it lacks {', '.join(missing)})"
        )
    spec = content["spec"]
    if spec["language"] not in LANGUAGES:
        raise ValueError(f"{path}: a Solution in {spec['language']}; those in {' and '.join(LANGUAGES)} can be run")
    definition = _definition_of(content["definition"], path)
    function = _entry_point(path, content["sources"], spec["entry_point"])
    return TraceFunction(definition, function, spec.get("destination_passing_style", True))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one object, a Definition or a Solution")
    return content


def _definition_of(name: str, solution: Path) -> Any:
    """The Definition `name` beside the Solution, or in definitions/ of a folder above it, as in a dataset."""
    candidates = [solution.resolve().parent / f"{name}.json"]
    for folder in solution.resolve().parents:
        if (folder / "definitions").is_dir():
            candidates += (folder / "definitions").rglob(f"{name}.json")
    for path in candidates:
        if path.is_file() and "reference" in (content := _read(path)):
            return content
    raise ValueError(
        f"{solution} is a Solution of {name}, and no {name}.json is beside it or in definitions/ of a folder above it"
    )


def _reference(definition: Mapping[str, Any]) -> Callable[..., Any]:
    module: dict[str, Any] = {"__name__": f"definition_{definition['name']}"}
    try:
        exec(compile(definition["reference"], f"<reference of {definition['name']}>", "exec"), module)
        return module["run"]
    except Exception as error:
        raise ValueError(f"the reference of {definition['name']}: {type(error).__name__}: {error}") from error


def _entry_point(path: Path, sources: list[dict[str, str]], entry_point: str) -> Callable[..., Any]:
    """The function of "FILE::FUNCTION". The files are written to a package, since Triton reads a kernel's source."""
    file, _, name = entry_point.partition("::")
    root = Path(tempfile.mkdtemp(prefix="flashinfer-trace-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    package = f"solution_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    for source in sources:
        place = PurePosixPath(source["path"])
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{path}: the path of a source must stay in the Solution, got {place}")
        (root / package / place).parent.mkdir(parents=True, exist_ok=True)
        (root / package / place).write_text(source["content"], encoding="utf-8")
    for name_of_module in [one for one in sys.modules if one == package or one.startswith(f"{package}.")]:
        del sys.modules[name_of_module]  # of an earlier state of the file
    sys.path[:0] = [str(root), str(root / package)]
    try:
        module = importlib.import_module(".".join([package, *PurePosixPath(file).with_suffix("").parts]))
        function = getattr(module, name)
    except Exception as error:
        raise ValueError(f"{path}: cannot import {entry_point}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(root / package))
        sys.path.remove(str(root))
    if not callable(function):
        raise ValueError(f"{path}: {entry_point} is not callable")
    return function
