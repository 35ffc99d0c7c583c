"""Import rules that import-linter ([tool.importlinter] in pyproject.toml, run by `make lint`) cannot express."""

import ast
import sys
from pathlib import Path

import pytest

from tests.support.programs import run_python
from tests.support.source_tree import imported_packages, module_name, parse, python_files

NANOVLLM = python_files("nanovllm")
MAX_LINES = 300


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("nanovllm/kernels", {"torch", "triton", "flash_attn", "nanovllm"}),
        ("reference", {"reference", "torch", "jaxtyping"}),
    ],
)
def test_external_packages_are_among_those_allowed(folder: str, allowed: set[str]) -> None:
    found = {package for path in python_files(folder) for package in imported_packages(path)}
    assert "torch" in found
    assert found - allowed - set(sys.stdlib_module_names) == set()


def test_get_context_is_read_in_the_attention_layer_only() -> None:
    def reads_context(path: Path) -> bool:
        nodes = ast.walk(parse(path))
        return any("get_context" in (getattr(node, "id", None), getattr(node, "attr", None)) for node in nodes)

    assert [module_name(path) for path in NANOVLLM if reads_context(path)] == ["nanovllm.layers.attention"]


READ_MODEL_CONFIG = (
    "nanovllm.models.registry; nanovllm.models.registry.load_model_config(nanovllm.bundled_model_path())"
)


@pytest.mark.parametrize(
    "module",
    ["nanovllm", "nanovllm.cli", "nanovllm.engine.scheduler", "nanovllm.engine.model_input", READ_MODEL_CONFIG],
)
def test_import_loads_no_torch(module: str) -> None:
    """`import nanovllm` is cheap; the engine's decisions need no torch, nor does the refusal of a wrong model."""
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'triton'}} & sys.modules.keys()))"
    result = run_python("-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_long_file_says_why_it_is_long() -> None:
    files = python_files("nanovllm", "reference", "tests")
    long_files = [path for path in files if path.read_text(encoding="utf-8").count("\n") > MAX_LINES]
    silent = [path for path in long_files if "one file" not in (ast.get_docstring(parse(path)) or "")]
    assert not silent, f"more than {MAX_LINES} lines: split them, or say why they are one file in the docstring"
