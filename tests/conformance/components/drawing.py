"""Draws the text of a picture: blocks of the cache as boxes with what they hold, requests as rows of their blocks."""

import re

from tools.docs.svg import MAX_WIDTH, Drawing

CELL, BOX, GAP = 20, 22, 8  # width of a slot, height of a block, space between blocks
LEFT, LABEL = 6, 34
BLOCK_HEIGHT, ROW_HEIGHT = 62, 46
_BLOCK = re.compile(
    r"block (?P<id>\d+) \|(?P<slots>.*?)\|(?:  ref (?P<count>-?\d+))?"
    r"(?P<owners>  in the tables? of [r\d, ]+?)?(?P<free>  free)?"
)
_REQUEST = re.compile(
    r"(?P<name>r\d+): prompt (?P<prompt>[-\d ]*?)(?:, output (?P<output>[-\d ]+))?; "
    r"(?:block table (?P<table>[\d ]+)|(?P<state>has ended|waits))"
)


def drawing(picture: str, title: str) -> Drawing:
    """picture: what picture.picture returned. Raises ValueError for a line that is none of its lines."""
    result, plan, size = Drawing(MAX_WIDTH, 0, title), _Plan(), 1
    for line in picture.splitlines():
        if block := _BLOCK.fullmatch(line):
            size = len(block["slots"].split())
            _draw_block(result, block, *plan.place(size * CELL, BLOCK_HEIGHT))
        elif request := _REQUEST.fullmatch(line):
            plan.new_line(LEFT + LABEL)
            _draw_row(result, request, plan, size)
        else:
            raise ValueError(f"no line of a picture: {line!r}")
    result.height = plan.bottom + 6
    return result


class _Plan:
    """Places boxes from left to right, and in the next line where the drawing ends."""

    def __init__(self) -> None:
        self.x, self.top, self.bottom, self.left = float(LEFT), 4.0, 4.0, float(LEFT)

    def place(self, width: float, height: float) -> tuple[float, float]:
        if self.x + width > MAX_WIDTH - LEFT and self.x > self.left:
            self.new_line(self.left)
        x, self.x = self.x, self.x + width + GAP
        self.bottom = max(self.bottom, self.top + height)
        return x, self.top

    def new_line(self, left: float) -> None:
        self.top, self.x, self.left = self.bottom, left, left


def _look(name: str) -> str:
    return "abcd"[int(name[1:]) % 4]


def _draw_block(result: Drawing, block: re.Match[str], x: float, top: float) -> None:
    slots, owners = block["slots"].split(), re.findall(r"r\d+", block["owners"] or "")
    width = len(slots) * CELL
    result.text(x, top + 10, block["id"], "small bold", "start")
    if block["count"]:
        result.text(x + width, top + 10, f"ref {block['count']}", "faint small", "end")
    result.box(x, top + 14, width, BOX, _look(owners[0]) if owners else "free dashed")
    if len(owners) > 1:
        for offset in range(3, width - 3, 6):
            result.line((x + offset, top + 13 + BOX), (x + offset + 4, top + 8 + BOX), look=_look(owners[1]))
    for index, slot in enumerate(slots):
        result.text(x + (index + 0.5) * CELL, top + 29, "" if slot == "." else slot, "" if owners else "faint")
    words = [*owners, *(["free"] if block["free"] else [])]
    result.text(x + width / 2, top + 14 + BOX + 12, " ".join(words), "faint small")


def _draw_row(result: Drawing, request: re.Match[str], plan: _Plan, size: int) -> None:
    """A token without a block is a box of its own."""
    look, top = _look(request["name"]), plan.top
    result.text(LEFT, top + 29, request["name"], f"bold {look}", "start")
    tokens = [(token, "") for token in request["prompt"].split()]
    tokens += [(token, f"bold {look}") for token in (request["output"] or "").split()]
    table = (request["table"] or "").split()
    for block_id in table:
        held, tokens = tokens[:size], tokens[size:]
        x, y = plan.place(size * CELL, ROW_HEIGHT)
        result.text(x, y + 10, block_id, "small bold", "start")
        result.box(x, y + 14, size * CELL, BOX, look)
        for index, (token, token_look) in enumerate(held):
            result.text(x + (index + 0.5) * CELL, y + 29, token, token_look)
    for token, token_look in tokens:
        x, y = plan.place(CELL, ROW_HEIGHT)
        plan.x -= GAP
        result.box(x, y + 14, CELL, BOX)
        result.text(x + CELL / 2, y + 29, token, token_look)
    if request["state"]:
        result.text(LEFT + LABEL, top + 10, request["state"], "faint small", "start")
