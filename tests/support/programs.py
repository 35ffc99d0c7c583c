"""run_python: a Python program in a process of its own, started in the checkout, that ends when a test hangs."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT


def run_python(
    *arguments: object, cwd: Path = ROOT, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, with `environment` added to the variables of this process."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **environment}, input=stdin,
        capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip
