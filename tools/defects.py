"""The tests that cover each id of DEFECTS.md, read from the tests. `python -m tools.defects` writes them into the
table."""

import ast
import re
from pathlib import Path

from tests.support.source_tree import ROOT, parse, python_files

TABLE = ROOT / "tests" / "DEFECTS.md"
ID = re.compile(r"\bD\d\d\b")
ROW = re.compile(r"^\| (D\d\d) \| (.*?) \|(.*?)\|$")


def covering_tests() -> dict[str, list[str]]:
    """Defect id -> `folder/test_file.py::test_name` of each test whose text, or the comment above it, holds the id."""
    found: dict[str, list[str]] = {}
    for path in python_files("tests"):
        if not path.name.startswith("test_"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        for name, node in _tests(parse(path)):
            for defect in dict.fromkeys(ID.findall("\n".join(lines[_first_line(node, lines) : node.end_lineno]))):
                found.setdefault(defect, []).append(f"{path.relative_to(ROOT / 'tests').as_posix()}::{name}")
    return found


def _tests(module: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """(name, node) of each test function and each test method; a method's name is Class::method."""
    tests = []
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            tests.append((node.name, node))
        elif isinstance(node, ast.ClassDef):
            methods = [
                item for item in node.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")
            ]
            tests += [(f"{node.name}::{method.name}", method) for method in methods]
    return tests


def _first_line(node: ast.FunctionDef, lines: list[str]) -> int:
    """Index of the first line of the decorators, or of the comment right above them."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return first


def written(text: str) -> str:
    """The table's text with its third column written again."""
    covered = covering_tests()
    lines = []
    for line in text.splitlines():
        row = ROW.match(line)
        if row:
            tests = "<br>".join(f"`{name}`" for name in sorted(covered.get(row[1], [])))
            line = f"| {row[1]} | {row[2]} | {tests + ' ' if tests else ''}|"
        lines.append(line)
    return "\n".join(lines) + "\n"


def update(path: Path = TABLE) -> None:
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    update()
