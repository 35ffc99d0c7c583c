"""The parts of a FlashInfer-Trace Definition that come from a reference: axes, inputs, outputs, and its source.

Shapes come from jaxtyping's annotations: Float[Tensor, "T H D"]. A letter is an axis; "B+1" and "2*F" are axes with a
constraint. Sizes that the model fixes are constant axes, and sizes that change from step to step are variable axes.
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
    """The dimension as an identifier, which the name of an axis must be.

    >>> [axis_name(dimension) for dimension in ("T", "B+1", "2*F", "D/2")]
    ['T', 'B_plus_1', 'F_times_2', 'D_over_2']
    """
    dimension = re.sub(r"^(\d+)\*(\w+)$", r"\2*\1", dimension)
    return dimension.replace("+", "_plus_").replace("*", "_times_").replace("/", "_over_")


def is_variable(dimension: str) -> bool:
    return bool(_letters(dimension) & VARIABLE)


def _letters(dimension: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]+", dimension))


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

    And two more keys. suffix: the end of the Definition's name, different for each definition of one reference.
    sizes: those of this call's variable axes.
    """
    signature = inspect.signature(function)
    sizes: dict[str, int] = {}
    specs: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}}
    annotations = {name: signature.parameters[name].annotation for name in inputs}
    annotations |= dict(zip(outputs, _output_annotations(signature.return_annotation, len(outputs)), strict=True))
    for kind, values in (("inputs", inputs), ("outputs", outputs)):
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                specs[kind][name] = {"shape": None, "dtype": SCALAR_DTYPES[type(value)]}
                continue
            names = dimensions(annotations[name], value)
            for dimension, size in zip(names, value.shape, strict=True):
                assert sizes.setdefault(dimension, size) == size, (name, dimension, size, sizes)
            specs[kind][name] = {"shape": [axis_name(dim) for dim in names], "dtype": _dtype(value)}
    axes = {
        axis_name(dim): ({"type": "var"} if is_variable(dim) else {"type": "const", "value": size})
        | {"description": DIMENSION_LETTERS.get(dim) or OTHER_LETTERS.get(dim) or dim}
        for dim, size in sizes.items()
    }
    plain = {dim: size for dim, size in sizes.items() if axis_name(dim) == dim}  # without "B+1" and "2*F"
    constraints = [
        f"{axis_name(dim)} == {dim.replace('/', ' // ')}"
        for dim in sizes
        if dim not in plain and _letters(dim) <= plain.keys()
    ]
    fixed = [f"{dim.lower()}{size}" for dim, size in plain.items() if not is_variable(dim)]
    dtype = next((spec["dtype"] for spec in specs["inputs"].values() if spec["shape"] and "float" in spec["dtype"]), "")
    return {
        "suffix": "_".join([*fixed, *([dtype] if dtype else [])]),
        "sizes": {axis_name(dim): size for dim, size in sizes.items() if is_variable(dim)},
        "axes": axes,
        "constraints": constraints,
        **specs,
    }


def _output_annotations(annotation: Any, number: int) -> list[Any]:
    """The annotations of `number` outputs. A union of a tensor and a tuple stands for one or for several."""
    choices = getattr(annotation, "__args__", (annotation,)) if not hasattr(annotation, "dim_str") else (annotation,)
    tuples = [choice.__args__ for choice in (annotation, *choices) if getattr(choice, "__origin__", None) is tuple]
    return list(tuples[0]) if number > 1 else [choices[0]]


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


# --- code ---


def code_of(function: Callable[..., Any], body: str, parameters: list[str]) -> str:
    """The source of a module in which run(parameters) returns `body`, an expression that calls `function`.

    It imports torch and the standard library only. jaxtyping's annotations remain, but are not evaluated.
    """
    parts = ["from __future__ import annotations", ""]
    parts += sorted({line for module in _modules(function.__module__) for line in _imports(module)})
    for module in _modules(function.__module__):
        parts += ["", f"# {module.replace('.', '/')}.py", *_definitions(module)]
    parts += ["", "", "@torch.no_grad()", f"def run({', '.join(parameters)}):", f"    return {body}"]
    return "\n".join(parts) + "\n"


def _modules(name: str) -> list[str]:
    """The module, and before it the modules of reference/ that it imports, directly or not."""
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
    """The source of the module's functions and constants, with the comments inside functions."""
    source, parts = inspect.getsource(importlib.import_module(module)), []
    for node in ast.parse(source).body[1:]:  # without the docstring
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.If):  # If: what the module runs as a script
            parts += ["", ast.get_source_segment(source, node) or ""]
    return parts
