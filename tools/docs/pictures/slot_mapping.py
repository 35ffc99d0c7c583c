"""A sequence of seven tokens, its block table, and the slots of the KV cache that slot_mapping() names for them.

The number in a slot is the position of the token that is stored there. Only a sequence's last block has empty slots.
"""

import torch

from reference.slot_mapping import slot_mapping
from tools.docs.svg import Drawing

BLOCK_SIZE, NUM_BLOCKS, BLOCK_TABLE, NUM_TOKENS = 4, 8, [7, 2], 7


def draw() -> Drawing:
    slots = slot_mapping(torch.arange(NUM_TOKENS), torch.tensor(BLOCK_TABLE), BLOCK_SIZE).tolist()
    position_of = {slot: position for position, slot in enumerate(slots)}
    drawing = Drawing(372, 268, "Positions of a sequence, its block table, and the slots of the cache")
    drawing.text(8, 24, "positions", "bold", "start")
    for position in range(NUM_TOKENS):
        drawing.box(84 + position * 30, 8, 30, 24, "ab"[position // BLOCK_SIZE], position)
    drawing.text(8, 80, "block table", "bold", "start")
    for index, block in enumerate(BLOCK_TABLE):
        tokens = range(index * BLOCK_SIZE, min((index + 1) * BLOCK_SIZE, NUM_TOKENS))
        middle = 84 + (tokens[0] + len(tokens) / 2) * 30
        drawing.arrow((middle, 34), (middle, 60), look="ab"[index])
        drawing.box(middle - 18, 62, 36, 26, "ab"[index], block)
    drawing.text(8, 122, "KV cache", "bold", "start")
    for block in range(NUM_BLOCKS):
        left, top = 10 + (block % 4) * 90, 144 + (block // 4) * 62
        drawing.text(left + 42, top - 6, f"block {block}", "small" if block in BLOCK_TABLE else "faint small")
        for offset in range(BLOCK_SIZE):
            slot = block * BLOCK_SIZE + offset
            position = position_of.get(slot)
            look = "free" if position is None else "ab"[position // BLOCK_SIZE]
            drawing.box(left + offset * 21, top, 21, 24, look, "" if position is None else position)
            drawing.text(left + offset * 21 + 10.5, top + 37, slot, "faint small")
    drawing.text(8, 264, "below each: its slot = block * 4 + position % 4", "faint small", "start")
    return drawing
