"""Mutant: one wrong change of one function of nanovllm, as data. Reads *.mutants, whose entries look so:

[D05-rewrites-a-shared-block] BlockManager.allocate
A block that another sequence owns is written once only.
tests: tests/unit/engine/test_block_manager.py
- min(seq.num_cached_tokens, 1)
+ 0

First line: the id, which begins with the defect of tests/DEFECTS.md that the change puts back, if any, and the name of
a function, method, class or module variable anywhere under nanovllm/, or the path of a file for what stands outside of
them. Then the reason why the change is wrong, the arguments for pytest, the old text, and the new text (none: the old
text is removed). The old text must occur once in what the name stands for; line breaks, indentation, comments and
trailing commas do not count. The first line of either text is not indented, the others are relative to it.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
_ENTRY = re.compile(r"\[(?P<id>(?P<defect>D\d\d)?[\w-]+)\] (?P<place>\S+)\n(?P<body>(?:.+\n)+)")
_GAP = r"(?:\s|#[^\n]*)*"  # between two tokens


class MutantError(ValueError):
    """An entry that cannot be read or does not fit the code."""


@dataclass(frozen=True)
class Mutant:
    """One entry. defect: such as "D05", or None. place: a qualified name or a path. tests: arguments for pytest."""

    id: str
    defect: str | None
    place: str
    why: str
    tests: tuple[str, ...]
    old: str
    new: str

    @property
    def paths(self) -> list[str]:
        """The paths among `tests`, without options such as -k NAME."""
        return [argument for argument in self.tests if "/" in argument]

    def apply(self, root: Path) -> tuple[Path, str]:
        """(path of the file, its whole text with the change). Raises MutantError unless the old text occurs once."""
        pattern = _pattern(self.old)
        found = {
            (path, match.start(), match.end())
            for path, text, start, end in _places(self.place, root)
            for match in pattern.finditer(text, start, end)
        }
        if len(found) != 1:
            raise MutantError(f"{self.id}: its old text must occur once in {self.place}, not {len(found)} times")
        ((path, start, end),) = found
        text = path.read_text(encoding="utf-8")
        line = text[text.rfind("\n", 0, start) + 1 : start]
        indentation = line[: len(line) - len(line.lstrip())]
        return path, text[:start] + self.new.replace("\n", f"\n{indentation}") + text[end:]

    def change(self) -> str:
        """The change as lines to print."""
        lines = [f"  - {line}" for line in self.old.splitlines()] + [f"  + {line}" for line in self.new.splitlines()]
        return "\n".join([f"{self.id} in {self.place}: {self.why}", *lines])


def read_mutants(folder: Path = FOLDER) -> list[Mutant]:
    """The entries of all *.mutants of `folder`. Raises MutantError that names the file and the entry."""
    return [mutant for path in sorted(folder.glob("*.mutants")) for mutant in _read(path)]


def _read(path: Path) -> Iterator[Mutant]:
    for text in re.split(r"\n{2,}", path.read_text(encoding="utf-8").strip()):
        if text.startswith("#"):
            continue
        entry = _ENTRY.fullmatch(text + "\n")
        lines: dict[str, list[str]] = {"- ": [], "+ ": [], "tests:": [], "": []}
        for line in entry["body"].splitlines() if entry else ():
            prefix = next(prefix for prefix in lines if line.startswith(prefix))
            lines[prefix].append(line[len(prefix) :])
        why, tests, old, new = " ".join(lines[""]), lines["tests:"], "\n".join(lines["- "]), "\n".join(lines["+ "])
        if entry is None or not (why and tests and old) or old == new:
            raise MutantError(
                f"{path.name}: an entry needs id, place, reason, tests, old text, other new text: {text!r}"
            )
        yield Mutant(entry["id"], entry["defect"], entry["place"], why, tuple(shlex.split(" ".join(tests))), old, new)


def _pattern(code: str) -> re.Pattern[str]:
    """Matches `code` however it is broken into lines and indented."""
    tokens = re.findall(r"\w+|[^\w\s]", re.sub(r",\s*([)\]}])", r"\1", code))
    is_word = [re.match(r"\w", token) is not None for token in tokens]
    pattern = (r"(?<!\w)" if is_word[0] else "") + re.escape(tokens[0])
    for i, token in enumerate(tokens[1:], start=1):
        pattern += (r"\s" if is_word[i - 1] and is_word[i] else "") + _GAP
        pattern += (",?" + _GAP if token in ")]}" else "") + re.escape(token)
    return re.compile(pattern + (r"(?!\w)" if is_word[-1] else ""))


def _places(place: str, root: Path) -> Iterator[tuple[Path, str, int, int]]:
    """(path, its text, where `place` begins and ends there) of each thing of that name."""
    if (root / place).is_file():
        text = (root / place).read_text(encoding="utf-8")
        yield root / place, text, 0, len(text)
        return
    for path in sorted((root / "nanovllm").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if place.rpartition(".")[2] not in text:
            continue
        yield from ((path, text, start, end) for name, start, end in definitions(text) if name == place)


@cache
def definitions(text: str) -> list[tuple[str, int, int]]:
    """(qualified name, where it begins and ends in `text`) of each function, class and module variable."""
    starts = [0, *(match.end() for match in re.finditer("\n", text)), len(text)]
    found = []
    for name, node in _named_nodes(ast.parse(text)):
        first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", ()))])
        found.append((name, starts[first - 1], starts[node.end_lineno or first]))
    return found


def _named_nodes(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield prefix + child.name, child
            yield from _named_nodes(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Module):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from ((target.id, child) for target in targets if isinstance(target, ast.Name))
        else:
            yield from _named_nodes(child, prefix)
