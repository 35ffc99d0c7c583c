"""tests/support/README.md has a row for each file, with the first sentence of its docstring."""

import ast
import re

from tests.support.source_tree import ROOT, parse

FOLDER = ROOT / "tests" / "support"


def test_each_file_has_its_row() -> None:
    rows = dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M))
    docstrings = {
        path.relative_to(FOLDER).as_posix(): (ast.get_docstring(parse(path)) or "").split("\n\n")[0].replace("\n", " ")
        for path in FOLDER.rglob("*.py")
    }
    assert rows == docstrings
