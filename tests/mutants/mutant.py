"""Mutant: one small wrong change to nanovllm's code, as data. Reads them from data/*.mutants, one file a component.

file: nanovllm/engine/block_manager.py            of the mutants that follow
tests: tests/unit/engine/test_block_manager.py    run first, in this order, until one fails; a file of
                                                  tests/kernels/*_cases.py is run by Triton's interpreter
then: tests/unit/engine/test_state_machine.py     run only for what survives those

[hash-without-parent] D09                         id, and the defects of DEFECTS.md that it puts back
Why it is wrong, in words.
- the old text, which occurs once in the file; without indentation it may be a part of a line
+ the new text, without a line of it the old text is removed
occurrence: 2 of 3                                if it does not occur once
tests: ...                                        of this mutant alone; `then:` likewise
equivalent: ...                                   the proof that nobody can notice; without it, a test must fail
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.source_tree import ROOT

FOLDER = Path(__file__).parent / "data"
_HEAD = re.compile(r"\[([a-z0-9-]+)\]((?: D\d\d)*)$")
_KEYS = ("file", "tests", "then", "occurrence", "equivalent")


class MutantError(ValueError):
    """A mutant that cannot be read or does not fit its file."""


@dataclass
class Mutant:
    """tests, then: paths or node ids. occurrence: (which, of how many), from 1. equivalent: the proof, or empty."""

    id: str
    component: str
    file: str
    tests: tuple[str, ...]
    then: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()
    why: str = ""
    old: str = ""
    new: str = ""
    occurrence: tuple[int, int] = (1, 1)
    equivalent: str = ""

    def apply(self, source: str) -> str:
        """`source`, the text of self.file, with the change. Raises MutantError if the old text is not as stated."""
        which, count = self.occurrence
        parts = source.split(self.old)
        if len(parts) - 1 != count:
            raise MutantError(f"{self.id}: {self.old!r} must occur {count} times in {self.file}, not {len(parts) - 1}")
        return self.old.join(parts[:which]) + self.new + self.old.join(parts[which:])


@dataclass
class _Reader:
    """Reads one file line by line; `defaults` hold what was said before the first mutant or between two."""

    component: str
    defaults: dict[str, tuple[str, ...]] = field(default_factory=dict)
    mutants: list[Mutant] = field(default_factory=list)
    current: Mutant | None = None

    def take(self, line: str) -> None:
        key, _, value = line.partition(":")
        head = _HEAD.match(line)
        if not line.strip():
            self.current = None
        elif line.startswith("#"):
            pass
        elif head:
            (file,) = self.defaults["file"]
            self.current = Mutant(
                head[1],
                self.component,
                file,
                self.defaults["tests"],
                self.defaults.get("then", ()),
                tuple(head[2].split()),
            )
            self.mutants.append(self.current)
        elif self.current is None:
            if key not in ("file", "tests", "then"):
                raise MutantError(f"neither a mutant nor one of file, tests, then: {line!r}")
            if key == "file":
                self.defaults.clear()
            self.defaults[key] = tuple(value.split())
        else:
            self._add(self.current, line, key, value.strip())

    @staticmethod
    def _add(mutant: Mutant, line: str, key: str, value: str) -> None:
        sides = {"-": "old", "+": "new"}
        if line[0] in sides and line[1:2] in ("", " "):
            side, before = sides[line[0]], getattr(mutant, sides[line[0]])
            setattr(mutant, side, f"{before}\n{line[2:]}" if before else line[2:])
        elif key in ("tests", "then"):
            setattr(mutant, key, tuple(value.split()))
        elif key == "occurrence":
            which, count = value.split(" of ")
            mutant.occurrence = (int(which), int(count))
        elif key == "equivalent" or mutant.equivalent:
            mutant.equivalent = f"{mutant.equivalent} {value if key == 'equivalent' else line}".strip()
        else:
            mutant.why = f"{mutant.why} {line}".strip()


def read_mutants(folder: Path = FOLDER) -> list[Mutant]:
    """Every mutant, by component. Raises MutantError that names file and line of what cannot be read."""
    return [mutant for path in sorted(folder.glob("*.mutants")) for mutant in _read(path)]


def _read(path: Path) -> Iterator[Mutant]:
    reader = _Reader(path.stem)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            reader.take(line.rstrip("\n"))
        except (MutantError, KeyError, ValueError) as error:
            raise MutantError(f"{path.name}:{number}: {error!r}") from error
    for mutant in reader.mutants:
        if not mutant.old or not mutant.why or mutant.old == mutant.new:
            raise MutantError(f"{path.name}: {mutant.id} needs a reason, an old text and another new one")
    return iter(reader.mutants)


def source_of(mutant: Mutant, root: Path = ROOT) -> str:
    return (root / mutant.file).read_text(encoding="utf-8")
