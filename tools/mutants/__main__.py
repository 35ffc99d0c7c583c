"""python -m tools.mutants: put each known defect back into the code; do the tests notice?"""

import argparse
import os
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from tools.mutants.mutant import FOLDER, Mutant, MutantError, read_mutants
from tools.mutants.runner import BrokenRun, check_baseline, run_mutants

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("ids", nargs="*", help="mutants, or defects such as D05; all of them by default")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--tests-pass", action="store_true", help="do not run the tests on the unchanged code first")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)  # another project and its mutants,
    parser.add_argument("--data", type=Path, default=FOLDER, help=argparse.SUPPRESS)  # for the tests of this program
    options = parser.parse_args(argv)
    try:
        mutants = read_mutants(options.data)
        chosen = [mutant for mutant in mutants if not options.ids or {mutant.id, mutant.defect} & set(options.ids)]
        if not chosen:
            print("error: no mutant of that name; --list shows them", file=sys.stderr)
            return 2
        if options.list:
            print(*(mutant.change() for mutant in chosen), sep="\n\n")
            return 0
        return _run(chosen, options)
    except (BrokenRun, MutantError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(mutants: list[Mutant], options: argparse.Namespace) -> int:
    for mutant in mutants:
        mutant.apply(options.root)  # raises MutantError for one that does not fit, before anything runs
    if not options.tests_pass:
        check_baseline(options.root, mutants, options.workers)
    num_survivors = 0
    results = run_mutants(options.root, mutants, options.workers)
    for mutant, is_caught in tqdm(
        results, total=len(mutants), desc="mutants", mininterval=1 if sys.stderr.isatty() else 20
    ):
        if not is_caught:
            num_survivors += 1
            tqdm.write(f"SURVIVED {mutant.change()}")
    print(f"{len(mutants) - num_survivors} of {len(mutants)} mutants were caught")
    return 1 if num_survivors else 0


if __name__ == "__main__":
    os.nice(10)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the copies are removed
    sys.exit(main())
