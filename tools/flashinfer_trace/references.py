"""A reference as FlashInfer-Trace wants it: axes, inputs and outputs from its signature, and code that imports torch.

Shapes come from jaxtyping's annotations: Float[Tensor, "T H D"]. A letter is an axis; "B+1" and "2*F" are axes with a
constraint. What a model fixes is a constant of the definition, and what changes from step to step is a variable.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from reference import DIMENSION_LETTERS

VARIABLE = {"T", "Tq", "Tk", "B", "q", "k", "n", "num_blocks", "max_blocks"}
OTHER_LETTERS = {
    "Tq": "query tokens of all sequences of a step, packed",
    "Tk": "key tokens of all sequences of a step, packed",
    "q": "query tokens of one sequence",
    "k": "key tokens of one sequence",
    "n": "blocks of one sequence",
    "heads": "query heads or key/value heads",
    "num_blocks": "blocks of the KV cache",
    "block_size": "slots of a block",
    "max_blocks": "width of the block tables",
}
SCALAR_DTYPES = {bool: "bool", int: "int64", float: "float32"}


def axis_name(dimension: str) -> str:
    """The name of an axis, which is an identifier.

    >>> [axis_name(dimension) for dimension in ("T", "B+1", "2*F", "D/2")]
    ['T', 'B_plus_1', 'F_times_2', 'D_over_2']
    """
    dimension = re.sub(r"^(\d+)\*(\w+)$", r"\2*\1", dimension)
    return dimension.replace("+", "_plus_").replace("*", "_times_").replace("/", "_over_")


def is_variable(dimension: str) -> bool:
    return bool(set(re.findall(r"[A-Za-z_]+", dimension)) & VARIABLE)


def dimensions(annotation: Any, value: torch.Tensor) -> list[str]:
    """The names of a tensor's dimensions; "..." stands for T, or T and heads."""
    choices = [annotation, *getattr(annotation, "__args__", ())]
    text = next(choice.dim_str for choice in choices if hasattr(choice, "dim_str"))
    names = text.split()
    if names[0] == "...":
        names = [*("T", "heads")[: value.dim() - len(names) + 1], *names[1:]]
    assert len(names) == value.dim(), (text, value.shape)
    return names


def describe(function: Callable[..., Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """axes, constraints, inputs and outputs of the Definition to which one call of a reference belongs.

    suffix: the end of its name, which tells definitions of one reference apart. sizes: of this call's variable axes.
    """
    signature = inspect.signature(function)
    sizes: dict[str, int] = {}
    specs: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}}
    annotations = {name: signature.parameters[name].annotation for name in inputs}
    annotations |= dict(zip(outputs, _of_returned(signature.return_annotation, len(outputs)), strict=True))
    for kind, values in (("inputs", inputs), ("outputs", outputs)):
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                specs[kind][name] = {"shape": None, "dtype": SCALAR_DTYPES[type(value)]}
                continue
            names = dimensions(annotations[name], value)
            for dimension, size in zip(names, value.shape, strict=True):
                assert sizes.setdefault(dimension, size) == size, (name, dimension, size, sizes)
            specs[kind][name] = {"shape": [axis_name(one) for one in names], "dtype": _dtype(value)}
    axes = {
        axis_name(one): ({"type": "var"} if is_variable(one) else {"type": "const", "value": size})
        | {"description": DIMENSION_LETTERS.get(one) or OTHER_LETTERS.get(one) or one}
        for one, size in sizes.items()
    }
    constraints = [f"{axis_name(one)} == {one.replace('/', ' // ')}" for one in sizes if axis_name(one) != one]
    known = {name for name in axes if name in sizes}
    constraints = [one for one in constraints if set(re.findall(r"[A-Za-z_]+", one.split("==")[1])) <= known]
    fixed = [f"{one.lower()}{size}" for one, size in sizes.items() if not is_variable(one) and axis_name(one) == one]
    dtype = next((spec["dtype"] for spec in specs["inputs"].values() if spec["shape"] and "float" in spec["dtype"]), "")
    return {
        "suffix": "_".join([*fixed, *([dtype] if dtype else [])]),
        "sizes": {axis_name(one): size for one, size in sizes.items() if is_variable(one)},
        "axes": axes,
        "constraints": constraints,
        **specs,
    }


def _of_returned(annotation: Any, number: int) -> list[Any]:
    """The annotations of `number` outputs. A union of a tensor and a tuple stands for one or for several."""
    choices = getattr(annotation, "__args__", (annotation,)) if not hasattr(annotation, "dim_str") else (annotation,)
    tuples = [choice.__args__ for choice in (annotation, *choices) if getattr(choice, "__origin__", None) is tuple]
    return list(tuples[0]) if number > 1 else [choices[0]]


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


# --- code ---


def code_of(function: Callable[..., Any], body: str, parameters: list[str]) -> str:
    """A module in which run(parameters) returns `body`, an expression that calls `function`. Imports torch, no more.

    jaxtyping's annotations stay as text, which nothing evaluates.
    """
    parts = ["from __future__ import annotations", ""]
    parts += sorted({line for module in _modules(function.__module__) for line in _imports(module)})
    for module in _modules(function.__module__):
        parts += ["", f"# {module.replace('.', '/')}.py", *_definitions(module)]
    parts += ["", "", "@torch.no_grad()", f"def run({', '.join(parameters)}):", f"    return {body}"]
    return "\n".join(parts) + "\n"


def _modules(name: str) -> list[str]:
    """The module and those of reference/ that it imports, each after what it imports."""
    found: dict[str, None] = {}
    for node in _parse(name).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reference."):
            found |= dict.fromkeys(_modules(node.module or ""))
    return [*found, name]


def _parse(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def _imports(module: str) -> list[str]:
    nodes = [node for node in _parse(module).body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = [ast.unparse(node) for node in nodes if "reference" not in ast.unparse(node)]
    return ["import torch", *(line for line in lines if "jaxtyping" not in line)]


def _definitions(module: str) -> list[str]:
    """The source of functions and constants, comments in functions included."""
    source, parts = inspect.getsource(importlib.import_module(module)), []
    for node in ast.parse(source).body[1:]:  # without the docstring
        if not isinstance(node, ast.Import | ast.ImportFrom):
            parts += ["", ast.get_source_segment(source, node) or ""]
    return parts
