"""Two matrices on top of each other, applied to one token: each row of weights makes one output of linear().

The outputs of each matrix are a slice of y. So an engine keeps gate_proj and up_proj as one matrix and reads x once.
"""

import torch

from reference.linear import linear
from tools.docs.svg import Drawing

X = torch.tensor([[1.0, 2.0, -1.0]])
GATE, UP = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.0, 1.0]])
CELL = 34


def draw() -> Drawing:
    weight = torch.cat([GATE, UP])
    y = linear(X, weight)[0].tolist()
    drawing = Drawing(372, 218, "One token times two stacked matrices")
    drawing.text(8, 53, "x", "bold", "start")
    for k, value in enumerate(X[0].tolist()):
        drawing.box(96 + CELL * k, 34, CELL, 28, "free", f"{value:g}")
        drawing.text(96 + CELL * k + CELL / 2, 26, f"k = {k}", "faint small")
    for n, row in enumerate(weight.tolist()):
        top, look = 76 + CELL * n, "a" if n < len(GATE) else "b"
        for k, value in enumerate(row):
            drawing.box(96 + CELL * k, top, CELL, CELL, look, f"{value:g}")
        drawing.arrow((96 + CELL * 3 + 8, top + CELL / 2), (240, top + CELL / 2))
        drawing.box(248, top, 42, CELL, look, f"{y[n]:g}")
        drawing.text(300, top + CELL / 2 + 4, f"n = {n}", "faint small", "start")
    for text, row, look in (("gate_proj", 1, "a"), ("up_proj", 3, "b")):
        drawing.text(88, 76 + CELL * row + 4, text, f"{look} small", "end")
    drawing.text(269, 66, "y", "bold")
    return drawing
