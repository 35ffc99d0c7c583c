"""Two texts in blocks of two tokens, and the first digits of the hash of each block.

block_hash() takes a block's tokens and its parent's hash. The texts differ in their second token only. Their last
blocks hold the same tokens, but what comes before them differs, so the hashes differ and the blocks are not shared.
"""

from reference.block_hash import block_hash
from tools.docs.svg import Drawing

TEXTS = [[11, 12, 13, 14, 15, 16], [11, 99, 13, 14, 15, 16]]


def draw() -> Drawing:
    drawing = Drawing(372, 216, "Chains of block hashes of two texts")
    for number, text in enumerate(TEXTS):
        top, parent, look = 26 + 104 * number, None, "ab"[number]
        drawing.text(8, top - 10, f"text {number}", f"{look} bold", "start")
        for index in range(0, len(text), 2):
            x, tokens = 8 + 62 * index, text[index : index + 2]
            value = block_hash(tokens, parent)
            for offset, token in enumerate(tokens):
                drawing.box(x + 40 * offset, top, 40, 26, look, token)
            drawing.arrow((x + 40, top + 28), (x + 40, top + 46))
            drawing.box(x, top + 48, 80, 24, "", f"{value:016x}"[:8])
            if parent is not None:
                drawing.arrow((x - 44, top + 60), (x - 2, top + 60))
                drawing.text(x - 22, top + 54, "parent", "faint small")
            parent = value
    return drawing
