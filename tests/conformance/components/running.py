"""Runs the checks as users do: in a process of their own, which has no nanovllm of this project loaded."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conformance.components.targets.faults import RIGHT, Fault
from tests.support.programs import run_python
from tests.support.source_tree import ROOT


def run_checks(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "tests.conformance.components", *arguments, PYTHONPATH=str(ROOT))


def verdicts_of(*paths: Path, scenarios: int, seed: int, seconds: int = 600) -> list[dict[str, dict[str, Any]]]:
    """{contract: verdict} of each checkout. The exit code is that of the worst."""
    result = run_checks(*paths, "--json", f"--scenarios={scenarios}", f"--seed={seed}", f"--seconds={seconds}")
    targets = json.loads(result.stdout)["targets"] if result.stdout else []
    assert targets, result.stderr
    assert result.returncode == max(target["exit_code"] for target in targets)
    return [{row["id"]: row for row in target["contracts"]} for target in targets]


def plant(faults: Mapping[str, Fault], folder: Path) -> list[Path]:
    """A copy of the right target with each fault, in folders that are named by number."""
    paths = []
    for number, fault in enumerate(faults.values()):
        paths.append(folder / f"target{number}")
        shutil.copytree(RIGHT, paths[-1], ignore=shutil.ignore_patterns("__pycache__"))
        fault.plant(paths[-1])
    return paths


def names(verdicts: Mapping[str, dict[str, Any]], kind: str) -> list[str]:
    return [name for name, row in verdicts.items() if row["verdict"] == kind]
