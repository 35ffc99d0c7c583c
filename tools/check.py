"""Runs the tests of changed files, nearest first: `make check FILES="nanovllm/engine/scheduler.py ..."`.

    python -m tools.check nanovllm/engine/scheduler.py            runs the stages one after the other
    python -m tools.check --show nanovllm/engine/scheduler.py     prints their commands

Up to four stages, each of which stops at its first failure and prints it at once:

1. the tests named after the file (tests/ mirrors nanovllm/; for a kernel, its cases),
2. the unit tests of all commands or models, and the others that import its module,
3. the rest of the same folder of unit tests,
4. the campaigns: tests/e2e, and tests/distributed where ranks could be concerned.

Without FILES, it checks the Python files under nanovllm/ that differ from the last commit. The exit status is that of
the first stage that fails, else 0.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Unit tests of all files of a folder, which they reach through the command line or by listing the package.
OF_FOLDER = {
    "nanovllm/commands/": ["tests/unit/test_cli.py", "tests/unit/test_console.py"],
    "nanovllm/models/": ["tests/unit/test_model_config.py"],
}
RANKS = ("nanovllm/worker/", "nanovllm/executor/", "nanovllm/distributed/", "nanovllm/layers/")


def stages(files: Iterable[str]) -> list[list[str]]:
    """pytest's arguments for each stage. Raises ValueError for a path that is not a file of nanovllm/."""
    named, importing, neighbours, kernels, campaigns = [], [], [], [], ["tests/e2e"]
    for file in files:
        path = Path(file)
        if path.parts[:1] != ("nanovllm",) or path.suffix != ".py" or not (ROOT / path).is_file():
            raise ValueError(f"FILES must be Python files of nanovllm/, relative to the project's root, got {file!r}")
        folder = Path("tests/kernels") if "kernels" in path.parts else Path("tests/unit", *path.parts[1:-1])
        if "kernels" in path.parts:
            kernels.append(path.stem)
        named += _tests(folder, f"test_{path.stem}.py") + _tests(folder, f"test_{path.stem}_*.py")
        importing += [test for start, tests in OF_FOLDER.items() if file.startswith(start) for test in tests]
        importing += [test for test in _tests(Path("tests/unit"), "**/test_*.py") if _imports(test, _module(path))]
        neighbours += _tests(folder, "test_*.py")
        if file.startswith(RANKS) and "tests/distributed" not in campaigns:
            campaigns.append("tests/distributed")
    cases = ["tests/kernels/test_kernels.py", "-k", " or ".join(kernels)] if kernels else []
    found = [cases]
    for tests in (named, importing, neighbours):
        found.append([test for test in dict.fromkeys(tests) if not any(test in stage for stage in found)])
    return [stage for stage in (*found, campaigns) if stage]


def _tests(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern))


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def _imports(test: str, module: str) -> bool:
    """Whether the file says `from nanovllm.engine.scheduler import ...` or `from nanovllm.engine import scheduler`."""
    text = (ROOT / test).read_text(encoding="utf-8")
    package, _, name = module.rpartition(".")
    return f"{module} import" in text or f"from {package} import {name}" in text


def command(tests: list[str]) -> list[str]:
    """pytest's command line for one stage: the first failure ends it."""
    return [sys.executable, "-m", "pytest", "-q", "-x", "--durations-min=10", "--benchmark-disable", *tests]


def changed_files() -> list[str]:
    """Python files of nanovllm/ that differ from the last commit."""
    git = ["git", "diff", "--name-only", "HEAD"]
    names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name.startswith("nanovllm/") and name.endswith(".py")]


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
