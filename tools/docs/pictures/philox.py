"""What philox() makes of the counters 0 to 7: each row is the 128 bits of one result, four words in four colours.

Neighbouring counters differ in a few bits. Their results differ in about 64 bits, as independent random numbers do.
"""

from itertools import pairwise

from reference.philox import philox
from tools.docs.svg import Drawing

NUM_COUNTERS, KEY = 8, (7, 0)


def draw() -> Drawing:
    left, cell, row = 30, 2.3, 22
    right = left + 128 * cell
    drawing = Drawing(372, 30 + row * NUM_COUNTERS, "Bits of Philox for neighbouring counters")
    drawing.text(left - 6, 14, "c0", "faint small", "end")
    drawing.text(left, 14, "four words of 32 bits", "faint small", "start")
    drawing.text(366, 14, "bits that change", "faint small", "end")
    results = [bits(counter) for counter in range(NUM_COUNTERS)]
    for counter, result in enumerate(results):
        y = 22 + row * counter
        drawing.text(left - 6, y + 12, counter, "small", "end")
        for index in (index for index, bit in enumerate(result) if bit):
            x = left + index * cell
            drawing.line((x, y + 8), (x + cell, y + 8), look=f"{'abcd'[index // 32]} bit")
    for counter, (above, below) in enumerate(pairwise(results)):
        changed = sum(a != b for a, b in zip(above, below, strict=True))
        drawing.text(right + 30, 22 + row * counter + 23, changed, "small")
    return drawing


def bits(counter: int) -> list[int]:
    """The four words, from the highest bit of each."""
    words = philox(KEY, (counter, 0, 0, 0))
    return [word >> bit & 1 for word in words for bit in range(31, -1, -1)]
