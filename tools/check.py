"""Run the tests that notice a change soonest: `make check FILES="nanovllm/engine/scheduler.py ..."`.

    python -m tools.check nanovllm/engine/scheduler.py            runs the stages one after the other
    python -m tools.check --show nanovllm/engine/scheduler.py     prints their commands

Three stages, each of which stops at its first failure and prints it at once:

1. the tests named after the file (tests/ mirrors nanovllm/), then the other unit tests that import its module,
2. the rest of the same folder of unit tests,
3. the campaigns: tests/e2e, and tests/distributed where ranks could be concerned.

Without FILES: the Python files under nanovllm/ that differ from the last commit. Exit status: that of the first stage
that fails, else 0.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANKS = ("nanovllm/worker/", "nanovllm/executor/", "nanovllm/distributed/", "nanovllm/layers/")


def stages(files: Iterable[str]) -> list[list[str]]:
    """The tests of each stage, as paths that pytest takes. Raises ValueError for what is no file of nanovllm/."""
    named, importing, neighbours, campaigns = [], [], [], ["tests/e2e"]
    for file in files:
        path = Path(file)
        if path.parts[:1] != ("nanovllm",) or path.suffix != ".py" or not (ROOT / path).is_file():
            raise ValueError(f"FILES must be Python files of nanovllm/, relative to the project's root, got {file!r}")
        folder = Path("tests/kernels") if "kernels" in path.parts else Path("tests/unit", *path.parts[1:-1])
        named += _tests(folder, f"test_{path.stem}*.py")
        module = ".".join(path.with_suffix("").parts)
        importing += [test for test in _tests(Path("tests"), "unit/**/test_*.py") if _imports(test, module)]
        neighbours += _tests(folder, "test_*.py")
        if file.startswith(RANKS) and "tests/distributed" not in campaigns:
            campaigns.append("tests/distributed")
    first = list(dict.fromkeys(named + importing))
    second = [test for test in dict.fromkeys(neighbours) if test not in first]
    return [stage for stage in (first, second, campaigns) if stage]


def _tests(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern))


def _imports(test: str, module: str) -> bool:
    """Whether the file names the module: `from nanovllm.engine.scheduler import ...`, `from nanovllm.engine import scheduler`."""
    text = (ROOT / test).read_text(encoding="utf-8")
    package, _, name = module.rpartition(".")
    return f"{module} import" in text or f"from {package} import {name}" in text


def command(tests: list[str]) -> list[str]:
    """pytest's command line for one stage: one process, the first failure ends it."""
    return [sys.executable, "-m", "pytest", "-q", "-x", "--durations=0", "--durations-min=10", *tests]


def changed_files() -> list[str]:
    """Python files of nanovllm/ that differ from the last commit."""
    result = subprocess.run(["git", "diff", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in result.stdout.split() if name.startswith("nanovllm/") and name.endswith(".py")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.check", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="of nanovllm/ (default: those that differ from HEAD)")
    parser.add_argument("--show", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_args(argv)
    files = arguments.files or changed_files()
    if not files:
        print("nothing to check: no file of nanovllm/ differs from the last commit; name one: FILES=nanovllm/...")
        return 0
    try:
        found = stages(files)
    except ValueError as error:
        parser.error(str(error))
    for number, tests in enumerate(found, 1):
        print(f"--- {number} of {len(found)}: {shlex.join(['python', *command(tests)[1:]])}", flush=True)
        if not arguments.show and (code := subprocess.run(command(tests), cwd=ROOT).returncode):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
