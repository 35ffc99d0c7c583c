r"""Formulas set as mathematics: lines of LaTeX become SVG outlines, so a page needs neither fonts nor scripts.

A line is `left & relation and right side & note`; the note is prose and may be missing. A word of several letters is a
name and is set upright: `block_table_{n}` is \mathrm{block\_table}_{n}. Subscripts are always in braces. matplotlib's
mathtext sets the formulas, so only its subset of LaTeX can be used.
"""

import html
import re

from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import text_to_path

_WORD = re.compile(r"(?<![\\A-Za-z0-9])(?:0x[0-9A-F]+|[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*(?<=\w\w))")
_EM = 20  # units of the SVG per em
_LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}


def names(line: str) -> set[str]:
    """The names of several letters in a line, without its note."""
    return set(_WORD.findall("&".join(line.split("&")[:2])))


def formula_html(lines: tuple[str, ...], plain_text: str) -> str:
    """The lines as one HTML block, aligned at their relations. plain_text: the same, for screen readers."""
    rows = []
    for line in lines:
        left, right, note = (part.strip() for part in [*line.split("&"), "", ""][:3])
        note = f' <span class="formula-note">{html.escape(note)}</span>' if note else ""
        right = "{} " + right if right[0] in "=\\\\" else right  # space after a relation needs something before it
        rows.append(f"<span>{svg(left)}</span><span>{svg(right)}{note}</span>")
    return f'<div class="formula" role="math" aria-label="{html.escape(plain_text)}">{"".join(rows)}</div>'


def svg(latex: str) -> str:
    """One expression on its baseline, measured in ems, in the colour of the text around it."""
    if not latex:
        return ""
    text = "$" + _WORD.sub(lambda word: r"\mathrm{" + word[0].replace("_", r"\_") + "}", latex) + "$"
    with rc_context({"mathtext.fontset": "cm"}):
        font = FontProperties(size=_EM)
        width, height, depth = text_to_path.get_text_width_height_descent(text, font, ismath=True)
        vertices, codes = text_to_path.get_text_path(font, text, ismath=True)
    points = [(x * _EM / text_to_path.FONT_SCALE, -y * _EM / text_to_path.FONT_SCALE) for x, y in vertices]
    return (
        f'<svg aria-hidden="true" viewBox="0 {depth - height:.2f} {width:.2f} {height:.2f}" style="'
        f"width:{width / _EM:.3f}em;height:{height / _EM:.3f}em;vertical-align:{-depth / _EM:.3f}em"
        f'"><path d="{_outline(points, list(codes))}"/></svg>'
    )


def _outline(points: list[tuple[float, float]], codes: list[int]) -> str:
    """matplotlib repeats a curve's code for each of its points; SVG writes the letter once."""
    parts, index = [], 0
    while index < len(codes):
        code = codes[index]
        if code == Path.CLOSEPOLY:
            parts.append("Z")
            index += 1
            continue
        count = {Path.CURVE3: 2, Path.CURVE4: 3}.get(code, 1)
        parts.append(_LETTERS[code] + " ".join(f"{x:.2f},{y:.2f}" for x, y in points[index : index + count]))
        index += count
    return "".join(parts)
