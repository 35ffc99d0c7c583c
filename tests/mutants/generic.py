"""python -m tests.mutants.generic: a generic mutation tool, mutmut, on nanovllm/engine/ (pip install mutmut==3.8.1).

mutmut changes every operator, number, string, argument and default in turn, and runs the tests that reach the change,
in a forked process each. Two passes: what the engine's unit tests reach, and LLMEngine, which needs a model. Prints
what survives, as a change; README.md judges those that are known. It takes about half an hour. Programs that the tests
start import mutmut, too: it must be installed where they look.
"""

import os
import re
import shutil
import subprocess
import sys

from tests.mutants.private_tree import PrivateTree

_UNIT = "tests/unit/engine/"
PASSES = {
    "decides": (
        [f"nanovllm/engine/{name}.py" for name in ("block_manager", "scheduler", "sequence", "model_input", "inputs")]
        + [f"nanovllm/engine/{name}.py" for name in ("detokenizer", "throughput", "__init__")],
        [_UNIT],
    ),
    "meets the model": (
        [f"nanovllm/engine/{name}.py" for name in ("llm_engine", "tokenizer", "request")],
        [
            f"{_UNIT}test_request.py",
            f"{_UNIT}test_tokenizer.py",
            "tests/e2e/test_generate.py",
            "tests/e2e/test_stream.py",
            "tests/e2e/test_errors.py",
            "tests/e2e/test_async_scheduling.py",
        ],
    ),
}
_OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
# tqdm's lock is shared by forked processes, and one that is killed while it holds the lock would hang all that follow.
_OWN_LOCK = "\nimport threading\nfrom tqdm import tqdm\ntqdm.set_lock(threading.RLock())\n"


def run_pass(sources: list[str], tests: list[str]) -> dict[str, list[str]]:
    """The names of the mutants by what became of them; shows the survivors."""
    with PrivateTree() as tree:
        shutil.rmtree(tree.root / "tests" / "mutants")
        (tree.root / "tests" / "unit" / "test_mutants.py").unlink()
        with (tree.root / "tests" / "conftest.py").open("a", encoding="utf-8") as conftest:
            conftest.write(_OWN_LOCK)
        with (tree.root / "pyproject.toml").open("a", encoding="utf-8") as settings:
            settings.write(
                f"\n[tool.mutmut]\nsource_paths = ['nanovllm']\nonly_mutate = {sources}\n"
                "also_copy = ['tests', 'reference', 'benchmarks', 'tools']\n"
                f"pytest_add_cli_args = {_OPTIONS}\npytest_add_cli_args_test_selection = {tests}\n"
            )
        mutmut, where = [sys.executable, "-m", "mutmut"], {"cwd": tree.root, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "dev"}
        subprocess.run([*mutmut, "run", "--max-children", "1"], check=True, env=environment, **where)
        shown = subprocess.run([*mutmut, "results", "--all", "true"], check=True, capture_output=True, **where).stdout
        found: dict[str, list[str]] = {}
        for name, outcome in re.findall(r"^\s*(\S+__mutmut_\d+): (.+)$", shown, re.MULTILINE):
            found.setdefault(outcome, []).append(name)
        for name in found.get("survived", []) + found.get("no tests", []):
            change = subprocess.run([*mutmut, "show", name], check=True, capture_output=True, **where).stdout
            print(name, *re.findall(r"^[-+] .*", change, re.MULTILINE), sep="\n")
    return found


def main() -> None:
    os.nice(10)
    for name, (sources, tests) in PASSES.items():
        found = {outcome: len(names) for outcome, names in run_pass(sources, tests).items()}
        total = sum(found.values())
        caught = found.get("killed", 0) + found.get("timeout", 0)
        print(f"\n{name}: {caught} of {total} caught, {100 * caught / total:.1f} %: {found}\n")


if __name__ == "__main__":
    main()
