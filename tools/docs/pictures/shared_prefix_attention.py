"""Three sequences that share two blocks: which keys are read, and how much weight the prefix has for each.

The share of the prefix follows from the two log-sum-exps of attend(). The shared keys are read once for all three.
"""

import torch

from reference.shared_prefix_attention import attend
from tools.docs.svg import Drawing

SHARED, OWN = 8, (3, 6, 2)


def draw() -> Drawing:
    cell, left, row = 18, 62, 36
    drawing = Drawing(372, 226, "Sequences that begin alike read the shared keys once")
    drawing.text(left, 20, "shared keys", "faint small", "start")
    drawing.text(left + SHARED * cell, 20, "own keys", "faint small", "start")
    drawing.text(366, 20, "prefix has", "faint small", "end")
    drawing.box(left, 28, SHARED * cell, 3 * row - 4, "c")
    for b, (num_own, share) in enumerate(zip(OWN, prefix_shares(), strict=True)):
        y, look = 34 + row * b, "abd"[b]
        drawing.text(left - 10, y + 16, f"seq {b}", f"{look} small", "end")
        for j in range(SHARED):
            drawing.circle(left + cell * j + cell / 2, y + 11, 3)
        for j in range(num_own):
            drawing.box(left + cell * (SHARED + j), y, cell, 22, look)
        drawing.text(366, y + 16, f"{100 * share:.0f} %", "small", "end")
    alone, together = len(OWN) * SHARED + sum(OWN), SHARED + sum(OWN)
    for number, (text, count) in enumerate((("each for itself", alone), ("prefix once", together))):
        y = 156 + 34 * number
        drawing.text(8, y + 15, text, "small", "start")
        drawing.box(92, y, 5.6 * count, 22, "free")
        drawing.text(92 + 5.6 * count + 8, y + 15, f"{count} keys read", "small", "start")
    return drawing


def prefix_shares() -> list[float]:
    """The part of each sequence's attention that falls on the shared keys."""
    generator = torch.Generator().manual_seed(2)
    prefix = torch.randn(SHARED, 1, 4, generator=generator, dtype=torch.float64)
    shares = []
    for num_own in OWN:
        query = torch.randn(1, 4, generator=generator, dtype=torch.float64)
        own = torch.randn(num_own, 1, 4, generator=generator, dtype=torch.float64)
        lse = torch.stack([attend(query, keys, keys, None)[1] for keys in (prefix, own)])
        shares.append(float(lse.softmax(dim=0)[0]))
    return shares
