"""python -m tests.mutants: would the tests notice? Each mutant in a private copy, its tests run, all added up."""

import argparse
import os
import random
import signal
import sys

from tests.mutants.mutant import Mutant, read_mutants
from tests.mutants.private_tree import BrokenRun
from tests.mutants.report import SCORE, changed_lines, is_good, text, write_score
from tests.mutants.results import Results
from tests.mutants.running import run_mutants


def main() -> int:
    arguments = _arguments()
    every = read_mutants()
    mutants = _chosen(every, arguments)
    if not mutants:
        print("no mutant of that name; --list shows them", file=sys.stderr)
        return 2
    if arguments.list:
        for mutant in mutants:
            print(
                f"{mutant.component}: {mutant.id} {' '.join(mutant.defects)}\n  {mutant.why}\n{changed_lines(mutant)}"
            )
        return 0
    os.nice(10)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves as Ctrl-C does: nothing behind
    try:
        results = run_mutants(mutants, Results(), arguments.workers, arguments.minutes, arguments.tests_pass)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(mutants, results))
    if arguments.sample:
        size = f"--sample {arguments.sample} --seed {arguments.seed}"
        print(f"\na sample of {len(mutants)} of {len(every)} mutants: repeat with {size}")
    if len(results) < len(mutants):
        print(f"\n{len(mutants) - len(results)} of them were not run: the minutes were over")
    elif len(mutants) == len(every):
        write_score(mutants, results)
        print(f"\nwritten to {SCORE}")
    return 0 if is_good(mutants, results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("ids", nargs="*", help="mutants to run; all of them by default")
    parser.add_argument("--component", action="append", default=[], help="only those of a component; may be repeated")
    parser.add_argument("--sample", type=int, help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, help="of the sample; a fresh one by default")
    parser.add_argument("--minutes", type=float, help="start no more after so many")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument(
        "--tests-pass", action="store_true", help="the tests are known to pass on the code as it is: begin at once"
    )
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(10**6)
    return arguments


def _chosen(mutants: list[Mutant], arguments: argparse.Namespace) -> list[Mutant]:
    chosen = [
        mutant
        for mutant in mutants
        if (not arguments.component or mutant.component in arguments.component)
        and (not arguments.ids or mutant.id in arguments.ids)
    ]
    if arguments.sample is None or arguments.sample >= len(chosen):
        return chosen
    drawn = random.Random(arguments.seed).sample(range(len(chosen)), arguments.sample)
    return [chosen[index] for index in sorted(drawn)]


if __name__ == "__main__":
    sys.exit(main())
