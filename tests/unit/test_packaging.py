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
from tests.support.source_tree import ROOT, imported_packages, python_files

PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "nanovllm")

# Prints the file of each module of the package in the current directory.
IMPORT_EVERYTHING = """
import importlib, pkgutil, nanovllm
for module in pkgutil.walk_packages(nanovllm.__path__, "nanovllm."):
    print(importlib.import_module(module.name).__file__)
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


@pytest.fixture(scope="module")
def distribution(unpacked_wheel: Path) -> importlib.metadata.Distribution:
    (found,) = importlib.metadata.distributions(path=[str(unpacked_wheel)])
    return found


def test_every_module_of_the_wheel_imports(unpacked_wheel):
    """D71: the checkout is out of reach, so a module that the wheel lacks cannot be found."""
    command = [sys.executable, "-c", IMPORT_EVERYTHING]
    result = subprocess.run(command, cwd=unpacked_wheel, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    expected = {str(unpacked_wheel / path.relative_to(ROOT)) for path in python_files("nanovllm")}
    assert {*result.stdout.split(), str(unpacked_wheel / "nanovllm" / "__init__.py")} == expected


def test_wheel_holds_every_file_of_the_package_and_no_other(unpacked_wheel):
    """D71: the bundled model and py.typed are no Python files and are packed only where pyproject.toml says so."""

    def files(root: Path) -> set[Path]:
        found = {path.relative_to(root) for path in (root / "nanovllm").rglob("*") if path.is_file()}
        return {path for path in found if "__pycache__" not in path.parts}

    assert files(unpacked_wheel) == files(ROOT)
    assert [path.name for path in unpacked_wheel.iterdir() if path.suffix != ".dist-info"] == ["nanovllm"]


def test_wheel_declares_the_nanovllm_command(distribution):
    scripts = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert scripts == {"nanovllm": "nanovllm.cli:main"}


def test_declared_dependencies_are_those_that_are_imported(distribution):
    """D71: an undeclared one is missing in an empty environment. triton's import is lazy and optional."""
    extra = "extra =="
    declared = {
        (extra in text, re.split(r"[^A-Za-z0-9_-]", text)[0].replace("-", "_")) for text in distribution.requires
    }
    imported = {package for path in python_files("nanovllm") for package in imported_packages(path)}
    assert imported - {"nanovllm", *sys.stdlib_module_names} - {name for _, name in declared} == set()
    assert {name for is_extra, name in declared if not is_extra} - imported - {"triton"} == set()
