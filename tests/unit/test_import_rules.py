"""Who may import whom: engine/ decides, worker/ computes, reference/ explains. Read off the import statements."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANG_SECONDS
from tests.source_tree import ROOT, Import, imports, module_name, parse, python_files

NANOVLLM = python_files("nanovllm")
REFERENCE = python_files("reference")
MAX_LINES = 300

# Leaves that everyone may import.
BASE = {
    "nanovllm.config",
    "nanovllm.config_json",
    "nanovllm.context",
    "nanovllm.model_config",
    "nanovllm.moe_config",
    "nanovllm.outputs",
    "nanovllm.progress",
    "nanovllm.rope_config",
    "nanovllm.sampling_params",
    "nanovllm.thread_waiting",
    "nanovllm.torchrun",
    "nanovllm.validation",
}
# What each part may import of nanovllm, beside itself and BASE. Of two names that fit a module, the longer one rules.
ALLOWED = {
    "nanovllm.engine.sequence": set(),
    "nanovllm.engine.model_input": {"nanovllm.engine.sequence"},
    "nanovllm.engine.block_manager": {"nanovllm.engine.sequence"},
    "nanovllm.engine.scheduler": {"nanovllm.engine.block_manager", "nanovllm.engine.sequence"},
    "nanovllm.kernels": set(),
    "nanovllm.layers": {"nanovllm.kernels"},
    "nanovllm.models": {"nanovllm.layers"},
    "nanovllm.worker": {"nanovllm.models", "nanovllm.layers", "nanovllm.kernels", "nanovllm.engine"},
}
FROM_ENGINE_TO_WORKER = {"ScheduledBatch", "nanovllm.engine.model_input"}


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def target(found: Import) -> str:
    """The module that is imported: `from nanovllm.engine import sequence` is nanovllm.engine.sequence."""
    dotted = f"{found.module}.{found.name}"
    return dotted if (ROOT / dotted.replace(".", "/")).with_suffix(".py").exists() else found.module


def violations(paths: list[Path], is_allowed) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}" + (f" ({found.name})" if found.name else "")
        for path in paths
        for found in imports(path)
        if not is_allowed(found)
    ]


def files_of(part: str) -> list[Path]:
    """Files of a package or module, less those that a longer key of ALLOWED governs."""
    return [
        path
        for path in NANOVLLM
        if is_inside(module_name(path), part)
        and not any(is_inside(module_name(path), other) and len(other) > len(part) for other in ALLOWED)
    ]


@pytest.mark.parametrize("part", ALLOWED)
def test_part_imports_only_what_lies_below_it(part):
    allowed = ALLOWED[part] | {part} | BASE
    assert files_of(part), f"{part} has no file: the rule is about nothing"
    assert not violations(
        files_of(part),
        lambda found: found.package != "nanovllm" or any(is_inside(target(found), other) for other in allowed),
    )


def test_base_modules_import_only_each_other():
    base = [path for path in NANOVLLM if module_name(path) in BASE]
    assert not violations(base, lambda found: found.package != "nanovllm" or target(found) in BASE)


def test_engine_never_imports_torch():
    assert not violations(files_of("nanovllm.engine"), lambda found: found.package not in {"torch", "triton"})


def test_worker_takes_only_the_batch_and_the_model_input_from_the_engine():
    assert not violations(
        files_of("nanovllm.worker"),
        lambda found: (
            not is_inside(found.module, "nanovllm.engine") or {found.name, target(found)} & FROM_ENGINE_TO_WORKER
        ),
    )


def test_the_two_halves_meet_in_llm_engine_only():
    outside = [path for path in NANOVLLM if not is_inside(module_name(path), "nanovllm.worker")]
    meeting = {
        module_name(path)
        for path in outside
        if any(is_inside(target(found), "nanovllm.worker") for found in imports(path))
    }
    assert meeting == {"nanovllm.engine.llm_engine"}


def test_get_context_is_read_in_the_attention_layer_only():
    def reads_context(path: Path) -> bool:
        nodes = ast.walk(parse(path))
        return any(
            (isinstance(node, ast.Name) and node.id == "get_context")
            or (isinstance(node, ast.Attribute) and node.attr == "get_context")
            for node in nodes
        )

    assert [module_name(path) for path in NANOVLLM if reads_context(path)] == ["nanovllm.layers.attention"]


def test_kernels_import_torch_and_triton_or_flash_attn_only():
    allowed = {"torch", "triton", "flash_attn", "nanovllm", *sys.stdlib_module_names}
    assert not violations(files_of("nanovllm.kernels"), lambda found: found.package in allowed)


def test_nanovllm_imports_neither_reference_nor_tests():
    assert not violations(NANOVLLM, lambda found: found.package not in {"reference", "tests"})


def test_reference_imports_itself_torch_and_the_standard_library_only():
    allowed = {"reference", "torch", "jaxtyping", *sys.stdlib_module_names}
    assert REFERENCE
    assert not violations(REFERENCE, lambda found: found.package in allowed)


@pytest.mark.parametrize(
    "module",
    ["nanovllm", "nanovllm.cli", "nanovllm.engine.scheduler", "nanovllm.engine.model_input"],
)
def test_import_loads_no_torch(module):
    """`import nanovllm` is cheap, and the engine's decisions can be run and tested without torch."""
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'triton'}} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_long_file_says_why_it_is_long():
    long_files = [
        path
        for path in python_files("nanovllm", "reference", "tests")
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES
    ]
    silent = [path for path in long_files if "one file" not in (ast.get_docstring(parse(path)) or "")]
    assert not silent, f"more than {MAX_LINES} lines: split them, or say why they are one file in the docstring"
