"""Draws the text of a picture: blocks of the cache as boxes with what they hold, requests as rows of their blocks."""

import re
from typing import Any, NamedTuple

from tools.docs.svg import MAX_WIDTH, Drawing

CELL, BOX, GAP = 20, 22, 8  # width of a slot, height of a block, space between blocks
LEFT, LABEL = 6, 34
_BLOCK = re.compile(r"block (\d+) \|(.*?)\|(?:  ref (-?\d+))?(?:  in the tables? of ([r\d, ]+?))?(  free)?")
_REQUEST = re.compile(r"(r\d+): prompt ([-\d ]*?)(?:, output ([-\d ]+))?; (?:block table ([\d ]+)|has ended|waits)")


class Block(NamedTuple):
    id: int
    slots: list[str]
    count: str
    owners: list[str]
    is_free: bool


class Row(NamedTuple):
    name: str
    prompt: list[str]
    output: list[str]
    table: list[int]
    state: str


def drawing(picture: str, title: str) -> Drawing:
    """picture: what picture.picture returned. Raises ValueError for a line that is none of its lines."""
    blocks, rows = read(picture)
    size = len(blocks[0].slots) if blocks else 1
    plan = _Plan(size)
    places = [(block, *plan.place(size * CELL, 62)) for block in blocks]
    plan.new_line(62 if blocks else 0)
    starts = [(row, *_row_places(plan, row, size)) for row in rows]
    result = Drawing(MAX_WIDTH, plan.bottom + 6, title)
    for block, x, top in places:
        _draw_block(result, block, x, top)
    for row, top, boxes in starts:
        _draw_row(result, row, top, boxes)
    return result


def read(picture: str) -> tuple[list[Block], list[Row]]:
    blocks, rows = [], []
    for line in picture.splitlines():
        block, request = _BLOCK.fullmatch(line), _REQUEST.fullmatch(line)
        if block:
            owners = block[4].split(", ") if block[4] else []
            blocks.append(Block(int(block[1]), block[2].split(), block[3] or "", owners, bool(block[5])))
        elif request:
            table = [int(block_id) for block_id in (request[4] or "").split()]
            state = "" if table else line.rpartition("; ")[2]
            rows.append(Row(request[1], request[2].split(), (request[3] or "").split(), table, state))
        else:
            raise ValueError(f"no line of a picture: {line!r}")
    return blocks, rows


class _Plan:
    """Places boxes from left to right, and in the next line where the drawing ends."""

    def __init__(self, size: int) -> None:
        self.x, self.top, self.bottom, self.left = float(LEFT), 4.0, 4.0, float(LEFT)

    def place(self, width: float, height: float) -> tuple[float, float]:
        if self.x + width > MAX_WIDTH - LEFT and self.x > self.left:
            self.new_line(height, self.left)
        x, self.x = self.x, self.x + width + GAP
        self.bottom = max(self.bottom, self.top + height)
        return x, self.top

    def new_line(self, height: float, left: float = LEFT) -> None:
        self.top, self.x, self.left = self.top + height, left, left


def _row_places(plan: _Plan, row: Row, size: int) -> tuple[float, list[Any]]:
    """(top of the row, for each box: its block or None, tokens, x, top, width). A token without a block is a box."""
    tokens = [*row.prompt, *row.output]
    plan.new_line(0, LEFT + LABEL)
    top, boxes, end = plan.top, [], len(row.table) * size
    parts: list[tuple[int | None, list[str]]] = [
        (block_id, tokens[index * size : (index + 1) * size]) for index, block_id in enumerate(row.table)
    ]
    parts += [(None, [token]) for token in tokens[end:]]
    for block_id, held in parts:
        width = (size if block_id is not None else 1) * CELL
        x, y = plan.place(width, 46)
        plan.x -= GAP if block_id is None else 0
        boxes.append((block_id, held, x, y, width))
    plan.new_line(46)
    return top, boxes


def _look(name: str) -> str:
    return "abcd"[int(name[1:]) % 4]


def _draw_block(result: Drawing, block: Block, x: float, top: float) -> None:
    width = len(block.slots) * CELL
    result.text(x, top + 10, block.id, "small bold", "start")
    if block.count:
        result.text(x + width, top + 10, f"ref {block.count}", "faint small", "end")
    result.box(x, top + 14, width, BOX, _look(block.owners[0]) if block.owners else "free dashed")
    if len(block.owners) > 1:
        for offset in range(3, width - 3, 6):
            result.line((x + offset, top + 13 + BOX), (x + offset + 4, top + 8 + BOX), look=_look(block.owners[1]))
    for index, slot in enumerate(block.slots):
        result.text(x + (index + 0.5) * CELL, top + 29, "" if slot == "." else slot, "" if block.owners else "faint")
    words = [*block.owners, *(["free"] if block.is_free else [])]
    result.text(x + width / 2, top + 14 + BOX + 12, " ".join(words), "faint small")


def _draw_row(result: Drawing, row: Row, top: float, boxes: list[Any]) -> None:
    result.text(LEFT, top + 29, row.name, f"bold {_look(row.name)}", "start")
    number = 0
    for block_id, tokens, x, y, width in boxes:
        if block_id is not None:
            result.text(x, y + 10, block_id, "small bold", "start")
        result.box(x, y + 14, width, BOX, "" if block_id is None else _look(row.name))
        for index, token in enumerate(tokens):
            is_output = number >= len(row.prompt)
            result.text(x + (index + 0.5) * CELL, y + 29, token, f"bold {_look(row.name)}" if is_output else "")
            number += 1
    if row.state:
        result.text(LEFT + LABEL, top + 10, row.state, "faint small", "start")
