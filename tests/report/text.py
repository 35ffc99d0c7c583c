"""The report's page as text."""

import textwrap

from tests.report.page import Bar, Cell, Page, Section

WIDTH = 120
BAR = 20


def to_text(page: Page) -> str:
    parts = [f"{page.title}\n{'=' * len(page.title)}", textwrap.fill(page.verdict, WIDTH)]
    if page.problems:
        parts.append("THE RUN FAILS:\n" + "\n".join(f"  - {problem}" for problem in page.problems))
    else:
        parts.append(page.good)
    parts.append("\n".join(f"{name:14}{value}" for name, value in page.facts))
    parts += [_section(section) for section in page.sections]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    head = f"{section.title}\n{'-' * len(section.title)}\n{textwrap.fill(section.text, WIDTH)}\n"
    if not section.rows:
        return f"{head}\n  {section.empty}"
    cells = [[_cell(cell) for cell in row] for row in section.rows]
    widths = [max(map(len, column)) for column in zip(section.columns, *cells, strict=True)]
    lines = [_line(row, widths, section.holds_numbers) for row in [list(section.columns), *cells]]
    return head + "\n" + "\n".join(lines)


def _line(cells: list[str], widths: list[int], to_right: list[bool]) -> str:
    padded = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, to_right, strict=True)
    ]
    return ("  " + "  ".join(padded)).rstrip()


def _cell(cell: Cell) -> str:
    if isinstance(cell, Bar):
        filled = round(BAR * min(max(cell.fraction, 0.0), 1.0))
        return f"{'#' * filled}{'.' * (BAR - filled)} {cell.label}".rstrip()
    return f"{cell:,}" if isinstance(cell, int) else cell
