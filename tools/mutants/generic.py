"""python -m tools.mutants.generic [PATTERN ...]: mutmut, which changes every operator, number, string and argument.

[tool.mutmut] in pyproject.toml lists the files and the tests. A PATTERN, such as "nanovllm.engine.scheduler*", chooses
some of the mutants. Prints the survivors and the score, and fails below LEAST_SCORE; survivors.md judges the survivors.
mutmut keeps its results in the folder mutants/ until the function changes: a run that was stopped goes on where it was.
Delete the folder when tests have changed.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tools.mutants.waiting import run_without_waiting

LEAST_SCORE = 96.0  # percent of all mutants, equivalent ones included
ROOT = Path(__file__).resolve().parents[2]
_NOT_CAUGHT = ("survived", "no tests", "suspicious", "skipped")
_MUTMUT = [sys.executable, "-m", "mutmut"]


def main() -> int:
    os.nice(10)
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick", "NANOVLLM_TEST_SEED": "0"}
    os.environ["NANOVLLM_TEST_HANG_SECONDS"] = "120"  # many a mutant makes threads wait for each other
    workers = os.environ.get("WORKERS", "2")
    run_without_waiting([*_MUTMUT, "run", "--max-children", workers, *sys.argv[1:]], ROOT)
    outcomes = dict(re.findall(r"^\s*(\S+__mutmut_\d+): (.+)$", _output("results", "--all", "true"), re.MULTILINE))
    for name, outcome in outcomes.items():
        if outcome in _NOT_CAUGHT:
            print(name, *re.findall(r"^[-+] .*", _output("show", name), re.MULTILINE), sep="\n")
    counts = Counter(outcomes.values())
    num_mutants = sum(counts.values()) - counts["not checked"]
    num_caught = num_mutants - sum(counts[outcome] for outcome in _NOT_CAUGHT)
    score = 100 * num_caught / num_mutants
    print(f"mutmut: {num_caught} of {num_mutants} mutants were caught, {score:.1f} %, of at least {LEAST_SCORE} %")
    print(dict(counts))
    return 0 if score >= LEAST_SCORE else 1


def _output(*arguments: str) -> str:
    return subprocess.run([*_MUTMUT, *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
