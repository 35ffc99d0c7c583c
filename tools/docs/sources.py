"""Links from the site to the files of the project: each linked file becomes a page with line numbers."""

import ast
import posixpath
from functools import cache
from pathlib import Path

from tools.mutants.mutant import definitions

ROOT = Path(__file__).resolve().parents[2]
# Documents of the checkout that are pages of the site as they are, in the order of its menu.
_GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("ARCHITECTURE.md", "TESTING.md", *_GUIDES, "tests/DEFECTS.md")
_LANGUAGES = {".py": "python", ".md": "markdown", ".toml": "toml", ".txt": "text"}
_NOT_ABOUT_THE_ENGINE = ("conftest", "test_reference_catalogue", "test_docs_site")


class Sources:
    """The linked files of one build."""

    def __init__(self) -> None:
        self.linked: set[str] = set()

    def link(self, page: str, path: str, place: str = "") -> str:
        """A link from a page of the site to a file or folder; place: a function, class or method in it.

        Raises ValueError when there is no such file or place.
        """
        target = ROOT / path
        if not target.exists():
            raise ValueError(f"{page} links {path}, which does not exist; correct the path")
        if path in DOCUMENTS:
            return posixpath.relpath(document_page(path), posixpath.dirname(page))
        self.linked.add(path.rstrip("/"))
        anchor = f"#__codelineno-0-{line_of(path, place)}" if place else ""
        return posixpath.relpath(source_page(path), posixpath.dirname(page)) + anchor


def heading(path: str) -> str:
    """The first heading of a document."""
    return (ROOT / path).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def document_page(path: str) -> str:
    return f"documents/{Path(path).stem.lower()}.md"


def source_page(path: str) -> str:
    return f"source/{path.rstrip('/')}.md"


def source_markdown(path: str) -> str:
    """The page that shows a file, or the names of a folder's files."""
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# `{path}`\n\n"
    target = ROOT / path
    if target.is_dir():
        names = sorted(f"{child.name}/" if child.is_dir() else child.name for child in target.iterdir())
        return head + "\n".join(f"- `{name}`" for name in names if not name.startswith(("__pycache__", ".")))
    text = target.read_text(encoding="utf-8").rstrip("\n")
    return f'{head}````{{.{_LANGUAGES.get(target.suffix, "text")} linenums="1"}}\n{text}\n````\n'


def line_of(path: str, place: str) -> int:
    """The line, from 1 on, where a definition begins. Raises ValueError when the file has none of that name."""
    text = (ROOT / path).read_text(encoding="utf-8")
    starts = [start for name, start, _ in definitions(text) if name == place]
    if len(starts) != 1:
        raise ValueError(f"{path} must define {place} once, not {len(starts)} times; correct the link")
    return text.count("\n", 0, starts[0]) + 1


def tests_of(reference_name: str) -> dict[str, str]:
    """Test files that import a file of reference/, directly or through tests/support -> their first sentence."""
    module = f"reference.{reference_name}"
    return {path: sentence for path, (modules, sentence) in _test_files().items() if module in _with_support(modules)}


@cache
def _test_files() -> dict[str, tuple[set[str], str]]:
    """Path of each test file that is about the engine or the reference -> imported modules, first sentence."""
    paths = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path.stem not in _NOT_ABOUT_THE_ENGINE]
    return {
        path.relative_to(ROOT).as_posix(): _imports_and_sentence(path)
        for path in paths
        if not path.is_relative_to(ROOT / "tests/support")
    }


@cache
def _imports_and_sentence(path: Path) -> tuple[set[str], str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    modules |= {node.module for node in nodes if node.module}
    return modules, first_sentence(ast.get_docstring(tree) or "")


def _with_support(modules: set[str]) -> set[str]:
    """The modules and what those of tests/support among them import."""
    support = [ROOT / f"{module.replace('.', '/')}.py" for module in modules if module.startswith("tests.support.")]
    return modules.union(*(_imports_and_sentence(path)[0] for path in support if path.exists()))


def first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".:")
