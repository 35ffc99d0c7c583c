"""Three sequences as a padded rectangle, and as packing() lays them end to end with their boundaries cu_seqlens.

Sequence b is packed[cu_seqlens[b] : cu_seqlens[b + 1]]. The rectangle computes on its padding; the packed tensor has
none.
"""

from itertools import pairwise

import torch

from reference.packing import packing
from tools.docs.svg import Drawing

SEQUENCES = [[7, 8, 9], [5], [3, 4]]


def draw() -> Drawing:
    packed, cu_seqlens = packing([torch.tensor(sequence) for sequence in SEQUENCES])
    cell, left = 36, 96
    longest = max(len(sequence) for sequence in SEQUENCES)
    drawing = Drawing(left + len(packed) * cell + 60, 236, "Sequences of different lengths, padded and packed")
    drawing.text(8, 16, "padded", "bold", "start")
    for b, sequence in enumerate(SEQUENCES):
        drawing.text(left - 10, 24 + 30 * b + 19, f"sequence {b}", "faint small", "end")
        for i in range(longest):
            has_token = i < len(sequence)
            drawing.box(
                left + i * cell,
                24 + 30 * b,
                cell,
                28,
                "abc"[b] if has_token else "free",
                (sequence[i : i + 1] or [""])[0],
            )
            if not has_token:
                drawing.text(left + i * cell + cell / 2, 24 + 30 * b + 18, "pad", "faint small")
    top = 160
    drawing.text(8, top - 14, "packed", "bold", "start")
    bounds = cu_seqlens.tolist()
    for position, token in enumerate(packed.tolist()):
        b = sum(bound <= position for bound in bounds) - 1
        drawing.box(left + position * cell, top - 26, cell, 28, "abc"[b], token)
    drawing.text(left - 10, top + 34, "cu_seqlens", "faint small", "end")
    for bound in bounds:
        drawing.arrow((left + bound * cell, top + 20), (left + bound * cell, top + 4))
        drawing.text(left + bound * cell, top + 34, bound, "bold")
    for b, (start, end) in enumerate(pairwise(bounds)):
        drawing.text(left + (start + end) * cell / 2, top + 56, f"seq {b}", f"{'abc'[b]} small")
    return drawing
