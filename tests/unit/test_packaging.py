"""The wheel holds everything and declares everything. D71."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT, imported_packages, module_name, python_files

PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "nanovllm")

# Prints the modules that it imported, one a line; everything under the folder given as argument.
IMPORT_EVERYTHING = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for path in sorted((root / "nanovllm").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__) == path, f"{name} came from {module.__file__}"
    print(name)
"""


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of the sources, unpacked into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, unpacked = folder / "source", folder / "wheels", folder / "unpacked"
    source.mkdir()
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*build, "-w", wheels, source], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    (wheel,) = wheels.glob("nanovllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_every_module_of_the_wheel_imports(unpacked_wheel):
    """D71: the checkout is out of reach, so a module that the wheel lacks cannot be found."""
    command = [sys.executable, "-c", IMPORT_EVERYTHING, str(unpacked_wheel)]
    result = subprocess.run(command, cwd=unpacked_wheel, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [module_name(path) for path in python_files("nanovllm")]


def test_wheel_holds_every_file_of_the_package(unpacked_wheel):
    """D71: the bundled model and py.typed are no Python files and are packed only where pyproject.toml says so."""

    def files(root: Path) -> set[Path]:
        return {
            path.relative_to(root)
            for path in (root / "nanovllm").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    assert files(unpacked_wheel) == files(ROOT)


def test_wheel_brings_no_other_top_level_package(unpacked_wheel):
    names = {path.name for path in unpacked_wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"nanovllm"}


def test_wheel_declares_the_nanovllm_command(unpacked_wheel):
    (distribution,) = importlib.metadata.distributions(path=[str(unpacked_wheel)])
    scripts = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert scripts == {"nanovllm": "nanovllm.cli:main"}


def test_every_third_party_import_is_a_declared_dependency(unpacked_wheel):
    """D71: what an installation lacks in an empty environment is what nobody declared."""
    (distribution,) = importlib.metadata.distributions(path=[str(unpacked_wheel)])
    requirements = distribution.requires or []
    names = {re.split(r"[^A-Za-z0-9_-]", requirement)[0] for requirement in requirements}
    declared = {name.replace("-", "_") for name in names}
    own = {"nanovllm", *sys.stdlib_module_names}
    undeclared = {
        f"{path.relative_to(ROOT)}: {package}"
        for path in python_files("nanovllm")
        for package in imported_packages(path) - own - declared
    }
    assert not undeclared


def test_every_declared_dependency_is_imported(unpacked_wheel):
    (distribution,) = importlib.metadata.distributions(path=[str(unpacked_wheel)])
    required = [text for text in distribution.requires or [] if "extra ==" not in text]
    declared = {re.split(r"[^A-Za-z0-9_-]", text)[0].replace("-", "_") for text in required}
    imported = {package for path in python_files("nanovllm") for package in imported_packages(path)}
    assert declared <= imported | {"triton"}, "triton: the kernels that need it come with the triton backend"
