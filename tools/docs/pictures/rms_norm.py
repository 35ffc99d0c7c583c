"""A vector that grows from layer to layer, and rms_norm() of it, which is the same for every length.

The residual stream after one, two and four layers of equal contributions; the weight is 1.
"""

import torch

from reference.rms_norm import rms_norm
from tools.docs.svg import Drawing

CONTRIBUTION = [0.9, -0.5, 0.2, 1.3, -1.1, 0.4]


def draw() -> Drawing:
    drawing = Drawing(372, 236, "A growing vector, and the vector after the norm")
    base = torch.tensor(CONTRIBUTION, dtype=torch.float64)
    for number, count in enumerate((1, 2, 4)):
        x = count * base
        y = torch.as_tensor(rms_norm(x, torch.ones_like(x)))
        left = 14 + 122 * number
        drawing.text(left, 14, f"{count} layer{'s' * (count > 1)}", "bold", "start")
        drawing.text(left, 30, f"rms {float(x.pow(2).mean().sqrt()):.2f}", "faint small", "start")
        _bars(drawing, left, 92, x.tolist(), "a")
        _bars(drawing, left, 190, y.tolist(), "b")
        drawing.text(left, 232, f"rms {float(y.pow(2).mean().sqrt()):.2f}", "faint small", "start")
    return drawing


def _bars(drawing: Drawing, left: float, middle: float, values: list[float], look: str) -> None:
    for index, value in enumerate(values):
        height = 10 * abs(value)
        drawing.box(left + 16 * index, middle - height if value > 0 else middle, 13, height, look)
    drawing.line((left - 3, middle), (left + 97, middle))
