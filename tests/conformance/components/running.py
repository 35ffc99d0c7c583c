"""Runs the checks as users do: in a process of their own, which has no nanovllm of this project loaded."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conformance.components.targets.faults import RIGHT, Fault
from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT


def run_checks(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.conformance.components", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)


def verdicts_of(*paths: Path, scenarios: int, seed: int, seconds: int = 600) -> list[dict[str, dict[str, Any]]]:
    """{contract: verdict} of each checkout."""
    result = run_checks(*paths, "--json", f"--scenarios={scenarios}", f"--seed={seed}", f"--seconds={seconds}")
    assert result.stdout, result.stderr
    return [{row["id"]: row for row in target["contracts"]} for target in json.loads(result.stdout)["targets"]]


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
