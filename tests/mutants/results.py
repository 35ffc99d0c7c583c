"""What each mutant came to, kept between runs in .mutants/ (git-ignored): a run that was interrupted goes on.

A result holds as long as nothing that it came from has changed: the mutant's text, the file it changes, its tests, and
what those import of tests/ and reference/.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from tests.mutants.mutant import Mutant
from tests.source_tree import ROOT, imports

FOLDER = ROOT / ".mutants"


@dataclass(frozen=True)
class Result:
    """is_caught: a test failed. by: which, or how the run ended. seconds: of CPU."""

    id: str
    is_caught: bool
    by: str
    seconds: float


class Results:
    """Results by key, appended to a file as they come."""

    def __init__(self, path: Path = FOLDER / "results.jsonl") -> None:
        self._path = path
        self._known: dict[str, Result] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while it wrote
                key = entry.pop("key")
                self._known[key] = Result(**entry)

    def get(self, key: str) -> Result | None:
        return self._known.get(key)

    def add(self, key: str, result: Result) -> None:
        self._known[key] = result
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **asdict(result)}) + "\n")


def key_of(mutant: Mutant) -> str:
    """Of the mutant as it is run; its reason and its verdict do not count."""
    change = [mutant.file, mutant.old, mutant.new, mutant.occurrence, mutant.tests, mutant.then]
    return _digest(change, [ROOT / mutant.file, *_involved((*mutant.tests, *mutant.then))])


def key_of_tests(tests: Iterable[str]) -> str:
    """Of tests that run on the code as it is."""
    tests = tuple(tests)
    return _digest(tests, [*sorted((ROOT / "nanovllm").rglob("*.py")), *_involved(tests)])


def _digest(what: object, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256(json.dumps(what).encode())
    for path in paths:
        digest.update(_content(path))
    return digest.hexdigest()


def _involved(tests: Iterable[str]) -> list[Path]:
    """The tests' files and what they import of tests/ and reference/, directly or not, sorted."""
    found: set[Path] = set()
    new = {ROOT / test.partition("::")[0] for test in tests}
    while new:
        found |= new
        new = {imported for path in new for imported in _imported(path)} - found
    return sorted(found)


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes()


@cache
def _imported(path: Path) -> frozenset[Path]:
    names = {f"{item.module}.{item.name}" for item in imports(path)} | {item.module for item in imports(path)}
    candidates = (ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith(("tests.", "reference.")))
    return frozenset(candidate for candidate in candidates if candidate.is_file())
