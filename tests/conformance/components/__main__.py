"""python -m tests.conformance.components PATH ...: examines checkouts of nano-vllm and of its forks."""

import argparse
import os
import random
import sys
from pathlib import Path

from tests.conformance.components import report
from tests.conformance.components.loading import NotRecognised, find_package

DEFAULT_SCENARIOS = 1500
DEFAULT_SECONDS = 90.0
WIDTH = 30
INTERRUPTED = 130  # 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE


def parser(prog: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=prog, description=__doc__)
    options.add_argument("paths", nargs="+", metavar="PATH", type=Path, help="root of a checkout; it is not written to")
    options.add_argument("--json", action="store_true", help="print JSON instead of text")
    options.add_argument("--html", metavar="FILE", type=Path, help="write a page with the verdicts")
    options.add_argument("--scenarios", type=int, default=DEFAULT_SCENARIOS, metavar="N", help="how many to draw")
    options.add_argument(
        "--seed", type=int, metavar="N", help="of the scenarios (default: a new one, which is printed)"
    )
    text = "draw no scenario after so many seconds a checkout"
    options.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, metavar="S", help=text)
    return options


def main(arguments: list[str], prog: str = "python -m tests.conformance.components") -> int:
    """Exit code: 0 nothing is broken; 1 a contract is; 2 a checkout that cannot be examined, or wrong arguments.

    130 Ctrl-C; 141 the reader of the output closed the pipe.
    """
    try:
        code = _examine_all(arguments, prog)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED


def _examine_all(arguments: list[str], prog: str) -> int:
    options = parser(prog)
    given = options.parse_args(arguments)
    if given.scenarios < 1 or not given.seconds > 0:  # nan is not
        options.error("--scenarios must be at least 1 and --seconds above 0")
    if given.html is not None and not given.html.resolve().parent.is_dir():
        options.error(f"--html {given.html}: the folder does not exist")
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(2**31)
    results, codes = [], []
    for path in given.paths:
        try:
            find_package(path)
            from tests.conformance.components.supervise import examine_target  # imports torch, which takes seconds

            result = examine_target(path, given.scenarios, seed, given.seconds, _bar)
        except NotRecognised as error:
            print(f"{prog}: error: {error}", file=sys.stderr)
            codes.append(2)
            continue
        results.append(result)
        codes.append(report.exit_code(result))
        if not given.json:
            print(report.as_text(result))
    if given.json:
        print(report.as_json(results))
    if given.html is not None and results:
        given.html.write_text(report.as_html(results), encoding="utf-8")
    return max(codes)


def _bar(done: int, total: int) -> None:
    if not sys.stderr.isatty():
        return
    filled = WIDTH * done // total
    end = "\r" + " " * (WIDTH + 30) + "\r" if done == total else ""
    print(f"\r[{'#' * filled}{'.' * (WIDTH - filled)}] {done} of {total} scenarios{end}", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
