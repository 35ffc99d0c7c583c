"""The files of reference/ as a set: the reading order is complete, and functions leave their inputs unchanged."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reference
from reference.attention import attention
from reference.moe import moe
from reference.packing import packing
from reference.paged_attention import paged_attention
from reference.rms_norm import rms_norm
from reference.rotary_embedding import rotary_embedding
from reference.sampling import allowed_mask
from reference.silu_and_mul import silu_and_mul
from reference.store_kvcache import store_kvcache

FOLDER = Path(reference.__file__).parent
NAMES = reference.reading_order()


def test_reading_order_lists_every_file_once() -> None:
    files = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("__"))
    assert sorted(NAMES) == files


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_only_files_before_it_in_the_reading_order(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    files_before = {f"reference.{other}" for other in NAMES[: NAMES.index(name)]}
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    foreign = {m for m in imported if m.split(".")[0] not in {*sys.stdlib_module_names, "torch", "jaxtyping"}}
    assert foreign <= files_before


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


CALLS: dict[str, tuple[Callable, list]] = {
    "attention": (attention, [floats(2, 4, 6), floats(5, 2, 6), floats(5, 2, 6)]),
    "packing": (lambda *sequences: packing(sequences)[0], [floats(2, 3), floats(4, 3)]),
    "store": (store_kvcache, [floats(2, 1, 4), floats(2, 1, 4), floats(3, 2, 1, 4), floats(3, 2, 1, 4), ints(4, -1)]),
    "paged": (
        paged_attention,
        [floats(2, 2, 4), floats(3, 2, 1, 4), floats(3, 2, 1, 4), ints(2, 0, 1, -1).view(2, 2), ints(3, 1)],
    ),
    "rms_norm": (lambda x, w, r: rms_norm(x, w, residual=r), [floats(3, 4), floats(4), floats(3, 4)]),
    "rotary": (rotary_embedding, [ints(0, 7), floats(2, 3, 4)]),
    "silu_and_mul": (silu_and_mul, [floats(3, 8)]),
    "moe": (lambda *xs: moe(*xs, 2, True), [floats(3, 4), floats(5, 4), floats(5, 6, 4), floats(5, 4, 3)]),
    "allowed_mask": (lambda z: allowed_mask(z, 3, 0.5, 0.1).double(), [floats(9)]),
}


@pytest.mark.parametrize("call", CALLS)
def test_float64_stays_float64_and_inputs_stay_as_they_were(call: str) -> None:
    """D50: these functions do not change their inputs, and compute in float64 when the inputs are float64."""
    function, arguments = CALLS[call]
    before = [argument.clone() for argument in arguments]
    result = function(*arguments)
    assert all(torch.equal(old, new) for old, new in zip(before, arguments, strict=True))
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    assert {tensor.dtype for tensor in results} == {torch.float64}
