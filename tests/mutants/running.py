"""Runs mutants, each in a worker's own PrivateTree, after their tests have passed on the code as it is."""

import queue
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

from tqdm import tqdm

from tests.mutants.mutant import Mutant, source_of
from tests.mutants.private_tree import BrokenRun, PrivateTree
from tests.mutants.results import Result, Results, key_of, key_of_tests

_Item = TypeVar("_Item")
_BASELINE_LIMIT = 300.0  # seconds of CPU that a test file may take on the code as it is
_GUESS = 20.0  # seconds of CPU that it takes, where it was not measured


def run_mutants(
    mutants: list[Mutant],
    results: Results,
    workers: int = 1,
    minutes: float | None = None,
    do_tests_pass: bool = False,
) -> list[Result]:
    """The results of `mutants` in order, known ones from `results`; fewer when the minutes are over.

    do_tests_pass: it is known that the tests pass on the code as it is. Otherwise they are run, and BrokenRun is raised
    when one fails: then no failure means anything.
    """
    keys = {mutant.id: key_of(mutant) for mutant in mutants}
    todo = [mutant for mutant in mutants if results.get(keys[mutant.id]) is None]
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    with ExitStack() as stack:
        trees = [stack.enter_context(PrivateTree()) for _ in range(min(workers, len(todo)))]
        if trees:
            seconds = _baseline(None if do_tests_pass else trees[0], todo, results)
            for result in _judge_all(todo, trees, seconds, end):
                results.add(keys[result.id], result)
    found = ((name, results.get(key)) for name, key in keys.items())
    return [replace(result, id=name) for name, result in found if result is not None]


def _judge_all(
    mutants: list[Mutant], trees: list[PrivateTree], seconds: dict[str, float], end: float
) -> Iterator[Result]:
    """Results as they come, a mutant a tree at a time; none is begun after `end`."""
    free: queue.SimpleQueue[PrivateTree] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)

    def judge(mutant: Mutant) -> Result | None:
        if time.monotonic() > end:
            return None
        tree = free.get()
        try:
            return _judged(mutant, tree, seconds)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as executor:
        futures = [executor.submit(judge, mutant) for mutant in mutants]
        try:
            for future in _progress(as_completed(futures), "mutants", len(futures)):
                result = future.result()
                if result is not None:
                    yield result
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for tree in trees:
                tree.kill()
            raise


def _judged(mutant: Mutant, tree: PrivateTree, seconds: dict[str, float]) -> Result:
    """Run the tests of `mutant`; `seconds` is what each of them takes on the code as it is."""
    source, total = mutant.apply(source_of(mutant, tree.root)), 0.0
    for tests in filter(None, (mutant.tests, mutant.then)):
        limit = 20 + 5 * sum(seconds[test] for test in tests)
        run = tree.run_changed(mutant.file, source, tests, limit)
        total += run.seconds
        if not run.passed:
            return Result(mutant.id, True, run.by, round(total, 1))
    return Result(mutant.id, False, "", round(total, 1))


def _baseline(tree: PrivateTree | None, mutants: Iterable[Mutant], results: Results) -> dict[str, float]:
    """Seconds of CPU that each test takes on the code as it is; guessed without a tree, where they are known to pass.

    Raises BrokenRun if one fails there.
    """
    tests = sorted({test for mutant in mutants for test in (*mutant.tests, *mutant.then)})
    if tree is None:
        return dict.fromkeys(tests, _GUESS)
    seconds = {}
    for test in _progress(tests, "tests on the code as it is", len(tests)):
        key = key_of_tests([test])
        known = results.get(key)
        if known is None:
            run = tree.run((test,), _BASELINE_LIMIT)
            if not run.passed:
                raise BrokenRun(f"{test} fails on the code as it is ({run.by}): mend that first")
            known = Result(test, False, "", round(run.seconds, 1))
            results.add(key, known)
        seconds[test] = known.seconds
    return seconds


def _progress(items: Iterable[_Item], what: str, number: int) -> Iterable[_Item]:
    """A progress bar; in a log, where it would be a line each time, one that moves twice a minute."""
    return tqdm(items, desc=what, total=number, mininterval=0.1 if sys.stderr.isatty() else 30)
