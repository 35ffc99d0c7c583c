"""A drawing in SVG: boxes, words, lines and arrows, with the colours of a light or a dark page.

Numbers are written with one decimal and the browser chooses the font, so a drawing gives the same file on every
machine. A drawing is at most 380 units wide, of which a letter takes 12, so that it can be read on a phone.
"""

import html
import re
from math import atan2, cos, pi, sin

MAX_WIDTH = 380
# Looks "a" to "d" mark sequences, ranks or experts; "free" marks what no sequence owns.
_LIGHT = {
    "ink": "#1f2933", "faint": "#667080", "grid": "#b8c0cc",
    "a": "#cfe2fb", "a-edge": "#2563b0", "b": "#fde1c1", "b-edge": "#b4540a",
    "c": "#cdeed3", "c-edge": "#23783c", "d": "#e6daf8", "d-edge": "#6b3fc0", "free": "#f3f4f6",
}  # fmt: skip
_DARK = {
    "ink": "#e4e7ec", "faint": "#a5adba", "grid": "#5d6675",
    "a": "#1d416b", "a-edge": "#85b8f5", "b": "#5c3411", "b-edge": "#f5b06b",
    "c": "#1c4d2b", "c-edge": "#7fd398", "d": "#412c6e", "d-edge": "#c3a6fa", "free": "#2b303a",
}  # fmt: skip


def _colors(colors: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colors.items())


_SHAPES = (
    ".picture{font:12px Helvetica,Arial,sans-serif}.picture text{fill:var(--ink)}.picture .faint{fill:var(--faint)}"
    ".picture .small{font-size:10.5px}.picture .bold{font-weight:bold}"
    ".picture rect,.picture circle{stroke:var(--grid);fill:none}.picture .free{fill:var(--free)}"
    ".picture path{stroke:var(--faint);fill:none;stroke-width:1.3}.picture path.head{fill:var(--faint);stroke:none}"
    ".picture .dashed{stroke-dasharray:4 3}.picture .bit{stroke-width:15}"
    + "".join(
        f".picture .{look}{{fill:var(--{look});stroke:var(--{look}-edge)}}"
        f".picture path.{look}{{fill:none}}.picture path.head.{look}{{fill:var(--{look}-edge)}}"
        f".picture text.{look}{{fill:var(--{look}-edge);stroke:none}}"
        for look in "abcd"
    )
)
# For the site, which has a switch between light and dark; and for a single file, which follows the system.
STYLE = f".picture{{{_colors(_LIGHT)}}}[data-md-color-scheme=slate] .picture{{{_colors(_DARK)}}}{_SHAPES}"
_OWN_STYLE = f".picture{{{_colors(_LIGHT)}}}@media(prefers-color-scheme:dark){{.picture{{{_colors(_DARK)}}}}}{_SHAPES}"


class Drawing:
    """An empty drawing of width x height units; title: what a screen reader says of it."""

    def __init__(self, width: float, height: float, title: str) -> None:
        assert width <= MAX_WIDTH, f"a drawing is at most {MAX_WIDTH} units wide for phones, got {width}"
        self.width, self.height, self.title = width, height, title
        self._parts = list[str]()

    def box(self, x: float, y: float, width: float, height: float, look: str = "", text: object = "") -> None:
        """A rectangle with its upper left corner at (x, y), and words in its middle."""
        self._add(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2"{_class(look)}/>')
        if str(text):
            self.text(x + width / 2, y + height / 2 + 4, text)

    def text(self, x: float, y: float, text: object, look: str = "", anchor: str = "middle") -> None:
        """Words whose baseline is at y; anchor: which end is at x, or "middle"."""
        self._add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{_class(look)}>{html.escape(str(text))}</text>')

    def circle(self, x: float, y: float, radius: float, look: str = "") -> None:
        self._add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"{_class(look)}/>')

    def line(self, *points: tuple[float, float], look: str = "") -> None:
        self._add(f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"{_class(look)}/>')

    def arrow(self, *points: tuple[float, float], look: str = "") -> None:
        """A line with a head at the last point."""
        (x0, y0), (x1, y1) = points[-2:]
        angle = atan2(y1 - y0, x1 - x0)
        corners = [(x1 - 7 * cos(angle + turn), y1 - 7 * sin(angle + turn)) for turn in (pi / 7, -pi / 7)]
        self.line(*points[:-1], (x1 - 4 * cos(angle), y1 - 4 * sin(angle)), look=look)
        self.line((x1, y1), *corners, look=f"{look} head".strip())

    def inline(self) -> str:
        """The drawing as part of a page of the site."""
        return self._svg(f'width="100%" style="max-width:{self.width * 1.4:.0f}px" ', "")

    def file(self) -> str:
        """The drawing as a file of its own."""
        attributes = f'xmlns="http://www.w3.org/2000/svg" width="{self.width * 1.5:.0f}" '
        return self._svg(attributes, f"<style>{_OWN_STYLE}</style>\n")

    def _svg(self, attributes: str, style: str) -> str:
        title = html.escape(self.title)
        head = f'<svg {attributes}viewBox="0 0 {self.width:.0f} {self.height:.0f}" class="picture" role="img">'
        return f"{head}\n{style}<title>{title}</title>\n" + "\n".join(self._parts) + "\n</svg>\n"

    def _add(self, part: str) -> None:
        self._parts.append(part.replace("-0.0", "0.0"))


def inlined(file: str) -> str:
    """The text that Drawing.file() returned, as part of a page of the site. In a list or a paragraph it is one line."""
    width = float(re.findall(r'width="(\d+)" viewBox', file)[0])
    head = f'<svg width="100%" style="max-width:{width * 1.4 / 1.5:.0f}px" '
    text = re.sub(r'<svg xmlns="\S+" width="\d+" ', head, re.sub(r"<style>.*?</style>\n", "", file))
    return f'<figure class="drawn">{text}</figure>'.replace("\n", "")


def _class(look: str) -> str:
    return f' class="{look}"' if look else ""
