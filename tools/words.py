"""Words that the project does not use, since a reader has to translate them: `python -m tools.words [FILE ...]`.

Reads comments, docstrings, names of tests and messages of .py files, and .md files without their code. Prints
file:line, the word and what to write instead, and exits with 1 if there is one.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXCLUDED = ("nanovllm/assets/",)

# Regular expression -> what to write instead. A space stands for any white space. Processes are not people.
PERSON = "name what acts: the process, rank, thread, request, caller"
WORDS = {
    r"(?<!user\s)(?<!users\s)(?<!reader\s)(?<!people\s)who": PERSON,
    r"whoever|whom|whomever": PERSON,
    r"(no|some|any|every)body|(no|any|every) ?one(?= (that|who|reads|waits|knows|asked|else|holds|calls))": PERSON,
    r"poorest": "smallest, least; the minimum",
    r"last words": "failure report",
    r"(let|lets|letting) go|lets? \w+ go": "release, unblock, close",
    r"(take|takes|took) notice": "detect, observe",
    r"hear|hears|heard": "receive, read",
    r"in vain": "the result is discarded; without effect",
    r"(at|through|to|passed) the door": "admission, validation; when the request is added",
    r"(has|have|had|is|are) gone": "has exited, is closed, is deleted",
    r"lives|lived|outlives?": "is, exists, is stored, runs; runs longer than",
    r"(strike|strikes|struck)": "trigger, triggered",
    r"diary|holdings": "log, resource snapshot",
    r"for ever": "without end, indefinitely",
    r", as (\w+ ){1,3}(has|have) it": "say which document or program, in a sentence of its own",
}
PATTERNS = {
    re.compile(r"\b(" + word.replace(" ", r"\s+") + r")\b", re.IGNORECASE): advice for word, advice in WORDS.items()
}

LOGGING = {"debug", "info", "warning", "error", "exception", "fail", "skip"}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each part of the file that is prose."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield 1, re.sub(r"^```.*?^```|`[^`\n]*`", _without_text, source, flags=re.MULTILINE | re.DOTALL)
        return
    yield from _comments(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                yield node.body[0].lineno, ast.get_docstring(node, clean=False) or ""
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield node.lineno, node.name.replace("_", " ")
        for message in _messages(node):
            for part in ast.walk(message):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def _without_text(code: re.Match[str]) -> str:
    return "\n" * code[0].count("\n") or "`"


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments on adjacent lines are one text."""
    first, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != first + len(lines):
                yield first, "\n".join(lines)
                first, lines = token.start[0], []
            lines.append(token.string.lstrip("# "))
    yield first, "\n".join(lines)


def _messages(node: ast.AST) -> list[ast.expr]:
    """Expressions with the text of an exception, a failed assertion or a log line."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return node.exc.args
    if isinstance(node, ast.Assert) and node.msg is not None:
        return [node.msg]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGGING:
        return node.args
    return []


def findings(path: Path) -> list[tuple[int, str, str]]:
    """(line, word, what to write instead), by line."""
    return sorted(
        (first + text.count("\n", 0, match.start()), " ".join(match[0].split()), advice)
        for first, text in texts(path)
        for pattern, advice in PATTERNS.items()
        for match in pattern.finditer(text)
    )


def main(arguments: list[str]) -> int:
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = arguments or [name for name in listed.stdout.splitlines() if not name.startswith(EXCLUDED)]
    number = 0
    for name in files:
        for line, word, advice in findings(ROOT / name):
            print(f"{name}:{line}: {word!r}: {advice}")
            number += 1
    print(f"{number} words in {len(files)} files" if number else f"no such word in {len(files)} files")
    return int(number > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
