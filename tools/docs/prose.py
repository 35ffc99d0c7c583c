"""Docstrings as Markdown: their plain text is escaped, code in it is set as code, names of other pages become links."""

import re
from typing import NamedTuple

# What is code in a sentence: names with an underscore and sums of them, an index, a call, an operator between names.
_CODE = re.compile(
    r"(?P<url>github\.com/[\w./-]+\w)"
    r"|(?P<code>\w+(?:\.\w+)*\[[^\]]*\](?:\.\w+)*|\w*[a-z]_\w+(?:\(\))?(?: (?:[-+*/%]|//|<=) \w+)*|\w+\([\w., *]*\)"
    r"|-1\b|\b\w+ // \w+)"
    r"|(?P<arxiv>arXiv (?P<number>\d{4}\.\d{5}))"
    r"|(?P<special>[\\*_<>\[\]`#|])"
)


class Part(NamedTuple):
    """A piece of a docstring. kind: "text", a paragraph; "block", indented lines; "note", letters and papers."""

    kind: str
    text: str


def parts(docstring: str) -> list[Part]:
    """The paragraphs and indented blocks of a docstring, in order. A line that begins with "Why" begins a paragraph."""
    found: list[Part] = []
    kind, lines = "", list[str]()

    def end() -> None:
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            is_note = re.match(r"(Letters|Papers?):", lines[0])
            found.append(Part("note" if is_note else kind, "\n".join(lines)))
        lines.clear()

    for line in docstring.splitlines():
        new = "block" if line.startswith("    ") or (kind == "block" and not line) else "text"
        if new != kind or (new == "text" and (not line or re.match(r"Why|Letters:|Papers?:", line))):
            end()
            kind = new
        if line or lines:
            lines.append(line.removeprefix("    ") if kind == "block" else line)
    end()
    return found


def markdown(text: str, pages: tuple[str, ...] = ()) -> str:
    """A paragraph of plain text as Markdown; pages: names that are links to NAME.md beside this page."""

    def replace(match: re.Match[str]) -> str:
        if match["special"]:
            return f"&#{ord(match[0])};"
        if match["url"]:
            return f"[{match[0]}](https://{match[0]})"
        if match["arxiv"]:
            return f"[{match[0]}](https://arxiv.org/abs/{match['number']})"
        return f"[`{match[0]}`]({match[0]}.md)" if match[0] in pages else f"`{match[0]}`"

    return _CODE.sub(replace, " ".join(text.split()))


def with_bold_reason(text: str, pages: tuple[str, ...] = ()) -> str:
    """A paragraph that begins "Why x: " with these words in bold."""
    reason = re.match(r"(Why[^:.]*|Letters|Papers?): ", text)
    if reason is None:
        return markdown(text, pages)
    return f"**{markdown(reason[0])}** {markdown(text[reason.end() :], pages)}"
