"""The report's page as one HTML file: no script, no other file, light or dark as the reader's system is."""

from html import escape
from pathlib import Path

from tests.report.page import Bar, Cell, Page, Section

STYLE = Path(__file__).with_name("style.css")


def to_html(page: Page) -> str:
    state = "good" if page.is_good else "bad"
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in page.facts)
    sections = "\n".join(_section(section) for section in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.verdict)}</p>
<div class="verdict {state}">{_problems(page)}</div>
<dl>{facts}</dl>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _problems(page: Page) -> str:
    if page.is_good:
        return f"<strong>{escape(page.good)}</strong>"
    items = "".join(f"<li>{escape(problem)}</li>" for problem in page.problems)
    return f"<strong>The run fails.</strong><ul>{items}</ul>"


def _section(section: Section) -> str:
    head = f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>"
    if not section.rows:
        return f'<section>\n{head}\n<p class="empty">{escape(section.empty)}</p>\n</section>'
    kinds = [' class="number"' if is_number else "" for is_number in section.holds_numbers]
    titles = "".join(f"<th{kind}>{escape(title)}</th>" for title, kind in zip(section.columns, kinds, strict=True))
    rows = "\n".join(f"<tr>{_row(row, kinds)}</tr>" for row in section.rows)
    table = f"<table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f'<section>\n{head}\n<div class="scroll">{table}</div>\n</section>'


def _row(row: tuple[Cell, ...], kinds: list[str]) -> str:
    return "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))


def _cell(cell: Cell) -> str:
    if isinstance(cell, Bar):
        percent = 100 * min(max(cell.fraction, 0.0), 1.0)
        track = f'<span class="track"><span style="width:{percent:.1f}%"></span></span>'
        return f'<span class="bar">{track}{escape(cell.label)}</span>'
    return f"{cell:,}" if isinstance(cell, int) else escape(cell)
