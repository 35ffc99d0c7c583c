"""nanovllm conformance: checks the components of a fork of nano-vllm, with the tests of this project's checkout.

The checks are part of the tests and not of the installed package, so the command runs them in another process, from
the checkout. That process has no nanovllm of its own loaded, whose name the fork's package has.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanovllm.commands.options import add_command
from nanovllm.console import INTERRUPTED

CHECKS = "tests/conformance/components"
ROOT = Path(__file__).resolve().parents[2]


def add_parser(commands: Any) -> None:
    summary = "check scheduler, block manager and input preparation of a checkout of nano-vllm or a fork"
    command = add_command(commands, "conformance", run, summary, " PATH ...")
    text = "root of a checkout; it is read, and not written to"
    command.add_argument("paths", nargs="+", metavar="PATH", type=Path, help=text)
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.add_argument("--html", metavar="FILE", type=Path, help="write a page with the verdicts")
    command.add_argument("--scenarios", type=int, metavar="N", help="scenarios to draw (default: 1500)")
    command.add_argument(
        "--seed", type=int, metavar="N", help="of the scenarios (default: a new one, which is printed)"
    )
    command.add_argument("--seconds", type=float, metavar="S", help="draw no scenario after this time (default: 90)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code: 0 no contract is broken; 1 one is; 2 a checkout cannot be examined."""
    if not (ROOT / CHECKS).is_dir():
        raise ValueError(
            f"nanovllm conformance runs from a checkout, which has {CHECKS}, and not from an installed package; clone "
            "the project and run python -m nanovllm conformance there"
        )
    values = ("scenarios", "seed", "seconds")
    options = [f"--{name}={value}" for name in values if (value := getattr(arguments, name)) is not None]
    if arguments.html is not None:
        options.append(f"--html={arguments.html.resolve()}")
    options += ["--json"] * arguments.json
    paths = [str(path.resolve()) for path in arguments.paths]
    command = [sys.executable, "-c", _START, *options, "--", *paths]
    # After SIGTERM or Ctrl-C, run() kills the process, and the folder of its temporary files is removed here.
    with tempfile.TemporaryDirectory(prefix="nanovllm-conformance-") as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": folder}
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


# The name in messages is that of the command which the user has typed.
_START = f"""\
import sys
try:
    from {CHECKS.replace("/", ".")}.__main__ import main
except KeyboardInterrupt:
    sys.exit({INTERRUPTED})
sys.exit(main(sys.argv[1:], "nanovllm conformance"))
"""
