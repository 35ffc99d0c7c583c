"""What is known after a run of the tests: all that the report tells and that the checks judge."""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.evidence import Counts
from tests.source_tree import ROOT

WHOLE, PART, GPU = "the whole CPU suite", "a part of the tests", "the GPU tests"
PACKAGES = ("torch", "triton", "transformers", "numpy", "hypothesis", "pytest")
SCORE = ROOT / "tests" / "mutants" / "score.json"


@dataclass(frozen=True)
class Skip:
    """test: node id; of a module that was skipped whole, its path. reason: as the test gave it."""

    test: str
    reason: str


@dataclass
class Facts:
    scope: str = PART
    outcomes: Counter[str] = field(default_factory=Counter)  # passed, failed, error: of tests
    skips: list[Skip] = field(default_factory=list)
    never_collected: list[str] = field(default_factory=list)  # test files that the run did not come upon
    seconds: Counter[str] = field(default_factory=Counter)  # by test, its set-up and tear-down included
    counts: Counts = field(default_factory=Counts)
    defects: dict[str, tuple[str, int]] = field(default_factory=dict)  # id -> what holds, number of tests
    mutants: dict[str, Any] | None = None  # tests/mutants/score.json
    repeat: str = ""
    machine: dict[str, str] = field(default_factory=dict)  # what was there -> version

    @property
    def has_failed(self) -> bool:
        return bool(self.outcomes["failed"] or self.outcomes["error"])


def read_defects() -> dict[str, tuple[str, int]]:
    """Of every id in tests/DEFECTS.md: what holds instead, and how many tests name it."""
    from tests.defects import ROW, TABLE, covering_tests  # late: it reads every test

    covered = covering_tests()
    rows = (ROW.match(line) for line in TABLE.read_text(encoding="utf-8").splitlines())
    return {row[1]: (row[2], len(covered.get(row[1], []))) for row in rows if row}


def read_mutants(path: Path = SCORE) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def describe_machine() -> dict[str, str]:
    """Versions, processor cores, and the GPU if torch is loaded and has one."""
    machine = {"Python": sys.version.split()[0], "cores": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = "not installed"
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    machine["GPU"] = torch.cuda.get_device_name() if has_gpu else "none in use"
    return machine
