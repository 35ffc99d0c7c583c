"""The page of a file of reference/: idea, formula, reasons, picture, code, examples, the engine's file, exercises."""

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import reference
from tools.docs.engine import ENGINE
from tools.docs.exercises import exercises_markdown, exercises_of
from tools.docs.formula import formula_html
from tools.docs.formulas import FORMULAS
from tools.docs.pictures import figure, has_picture
from tools.docs.prose import markdown, parts, with_bold_reason
from tools.docs.sources import ROOT, Sources, tests_of


class Example(NamedTuple):
    """The examples of one function: its name, and Markdown with the doctests."""

    name: str
    text: str


def page_path(name: str) -> str:
    return f"reference/{name}.md"


def title(name: str) -> str:
    """What the module's docstring calls the idea: the words before its first colon."""
    return _docstring(name).partition(":")[0]


def reference_page(name: str, sources: Sources) -> str:
    """The page as Markdown. Raises AssertionError when an example of the file fails."""
    number = reference.reading_order().index(name) + 1
    first, *rest = parts(_docstring(name))
    others = tuple(other for other in reference.reading_order() if other != name)
    idea = first.text.partition(":")[2].strip()
    blocks = [part for part in rest if part.kind == "block"]
    sections = [
        f"---\ntitle: {title(name)}\nhide:\n  - toc\n---\n\n# {number}. {title(name)}",
        f'<p class="idea" markdown>{markdown(idea[0].upper() + idea[1:], others)}</p>',
        _formula_heading(name, blocks),
        *_prose(name, rest, others),
        _picture(name),
        _code(name, sources),
        _examples(name),
        _engine(name, sources),
        exercises_markdown(exercises_of(name), page_path(name), sources),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _docstring(name: str) -> str:
    return importlib.import_module(f"reference.{name}").__doc__ or ""


def _formula_heading(name: str, blocks: list) -> str:
    return "" if not blocks else "## The formula" if name in FORMULAS else "## The rule"


def _prose(name: str, rest: list, others: tuple[str, ...]) -> Iterator[str]:
    formulas = iter(FORMULAS.get(name, ()))
    has_reason = False
    for part in rest:
        if part.kind == "block":
            lines = next(formulas, None)
            yield formula_html(lines, part.text) if lines else f"```text\n{part.text}\n```"
            continue
        if part.text.startswith("Why") and not has_reason:
            has_reason = True
            yield "## Why"
        text = with_bold_reason(part.text, others)
        yield f'<p class="note" markdown>{text}</p>' if part.kind == "note" else text


def _picture(name: str) -> str:
    if not has_picture(name):
        return ""
    return f"## The picture\n\n{figure(name)}"


def _code(name: str, sources: Sources) -> str:
    path = f"reference/{name}.py"
    link = sources.link(page_path(name), path)
    text = f"The whole of [{path}]({link}), without the text above and the examples below."
    return f"## The code\n\n{text}\n\n```python\n{code_without_examples(name)}\n```"


def _examples(name: str) -> str:
    examples = "\n\n".join(f"### {example.name}\n\n{example.text}" for example in run_examples(name))
    return f"## Examples\n\nThey ran when this page was built, and are tests.\n\n{examples}"


def _engine(name: str, sources: Sources) -> str:
    page = page_path(name)
    lines = ["## In the engine", ""]
    for file, place, what in ENGINE.get(name, ()):
        path = f"nanovllm/{file}"
        link = f"[`{place or file}`]({sources.link(page, path, place)})"
        lines.append(f"- {link} in `{file}` {what}" if place else f"- {link} {what}")
    files, through = tests_of(name), ""
    held = {path: text for path, text in files.items() if not path.startswith("tests/unit/reference/")}
    if not held:
        users = [other for other in reference.reading_order() if _uses(other, name)]
        held = {path: text for user in users for path, text in tests_of(user).items() if "unit/reference" not in path}
        through = f", through {', '.join(f'[{title(user)}]({user}.md)' for user in users)}"
    lines += ["", f"These tests hold the engine against this file{through}:", ""]
    lines += [f"- [{path}]({sources.link(page, path)}): {markdown(text)}" for path, text in held.items()]
    laws = {path: text for path, text in files.items() if path not in held}
    lines += ["", "And these hold this file itself against laws and other implementations:", ""] if laws else []
    lines += [f"- [{path}]({sources.link(page, path)}): {markdown(text)}" for path, text in laws.items()]
    return "\n".join(lines)


def _uses(other: str, name: str) -> bool:
    return f"from reference.{name} import" in (ROOT / f"reference/{other}.py").read_text(encoding="utf-8")


def _definitions_with_examples(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ">>>" in (ast.get_docstring(node) or ""):
            yield node


def code_without_examples(name: str) -> str:
    """The file without its docstring and its last call; of docstrings with examples only the first paragraph."""
    text = (ROOT / f"reference/{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    for node in sorted(_definitions_with_examples(tree), key=lambda node: -node.lineno):
        docstring = node.body[0]
        contract = (ast.get_docstring(node) or "").split("\n\n")[0].rstrip(":")
        indent = " " * docstring.col_offset
        shown = f'"""{contract}"""'.split("\n")
        lines[docstring.lineno - 1 : docstring.end_lineno] = [indent + line for line in shown]
    return "\n".join(lines[tree.body[0].end_lineno :]).partition('if __name__ == "__main__":')[0].strip("\n")


def run_examples(name: str) -> list[Example]:
    """The examples of every function, after running them. Raises AssertionError that shows one that fails."""
    module = importlib.import_module(f"reference.{name}")
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    found = sorted(doctest.DocTestFinder().find(module), key=lambda test: test.lineno or 0)
    examples = []
    for test in found:
        if not test.examples:
            continue
        report = list[str]()
        failed = runner.run(test, out=report.append).failed
        assert not failed, f"an example of {test.name} fails:\n{''.join(report)}"
        examples.append(Example(test.name.partition(f"reference.{name}.")[2], _example_markdown(test.docstring or "")))
    return examples


def _example_markdown(docstring: str) -> str:
    """The docstring after its first paragraph, with the doctests as blocks."""
    pieces, code = list[str](), ""
    for piece in doctest.DocTestParser().parse(docstring):
        if isinstance(piece, doctest.Example):
            prompt = piece.source.rstrip("\n").replace("\n", "\n... ")
            code += f">>> {prompt}\n{piece.want}"
        elif piece.strip():
            pieces += [f"```pycon\n{code}```"] if code else []
            pieces += [piece]
            code = ""
    pieces += [f"```pycon\n{code}```"] if code else []
    first, *rest = pieces
    prose = [markdown(paragraph) for paragraph in re.split(r"\n\s*\n", first.strip())[1:]]
    return "\n\n".join([*prose, *(piece if piece.startswith("```") else markdown(piece) for piece in rest)])
