"""Runs the examples of references and shows them: `python -m reference packing`; all of them in reading order without a
name. From any folder, `python reference packing` and `python reference/packing.py` do the same. Exits with 1 if an
example gives something else.
"""

import argparse
import doctest
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python reference`

from reference import reading_order


class ShowingRunner(doctest.DocTestRunner):
    """Shows each example and what it gives, by `out`: while an example runs, standard output is captured."""

    def report_start(self, out, test, example):
        first, *more = example.source.splitlines()
        out("".join(f"{prompt} {line}\n" for prompt, line in [(">>>", first), *(("...", line) for line in more)]))

    def report_success(self, out, test, example, got):
        out(got)


def main(argv: list[str] | None = None) -> int:
    """argv: names, sys.argv's by default. Returns the exit code."""
    names = reading_order()
    parser = argparse.ArgumentParser(prog="python -m reference", description="Run the examples of references.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names)}, or the path of its file")
    chosen = [Path(name).stem for name in parser.parse_args(argv).names]
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"NAME must be one of {', '.join(names)}, got {unknown[0]}")
    num_failures = 0
    for name in chosen or names:
        module = importlib.import_module(f"reference.{name}")
        print(f"--- {name}: {(module.__doc__ or '').splitlines()[0].partition(': ')[2]}\n")
        for test in doctest.DocTestFinder().find(module):
            if test.examples:
                num_failures += ShowingRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed
                print()
    return int(num_failures > 0)


if __name__ == "__main__":
    sys.exit(main())
