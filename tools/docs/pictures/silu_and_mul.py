"""The gate silu(g) beside max(g, 0): what silu_and_mul() returns for an up half of 1.

For very negative g nothing passes, for large g the gate itself passes, and between them there is no corner.
"""

import torch

from reference.silu_and_mul import silu_and_mul
from tools.docs.svg import Drawing

LOW, HIGH = -6.0, 4.0


def draw() -> Drawing:
    left, bottom, scale = 20, 170, 33
    drawing = Drawing(372, 220, "The gate silu(g), beside max(g, 0)")

    def at(g: float, y: float) -> tuple[float, float]:
        return left + (g - LOW) * scale, bottom - y * scale

    drawing.arrow(at(LOW, 0), at(HIGH, 0))
    drawing.arrow(at(0, -0.6), at(0, 4.6))
    for g in (-6, -4, -2, 2, 4):
        drawing.text(at(g, 0)[0], bottom + 18, g, "faint small")
    for y in (2, 4):
        drawing.text(at(0, 0)[0] - 8, at(0, y)[1] + 4, y, "faint small", "end")
    gates = torch.arange(LOW, HIGH + 0.01, 0.125, dtype=torch.float64)
    passed = silu_and_mul(torch.stack([gates, torch.ones_like(gates)], dim=1)).flatten()
    drawing.line(at(LOW, 0), at(0, 0), at(HIGH, HIGH), look="b dashed")
    drawing.line(*(at(g, y) for g, y in zip(gates.tolist(), passed.tolist(), strict=True)), look="a")
    drawing.text(at(1.9, 0)[0], at(0, 2.9)[1], "max(g, 0)", "b", "end")
    drawing.text(at(2.4, 0)[0], at(0, 1.7)[1], "silu(g)", "a", "start")
    lowest = int(passed.argmin())
    x, y = at(float(gates[lowest]), float(passed[lowest]))
    drawing.text(x, y + 34, f"lowest: {float(passed[lowest]):.2f}", "faint small")
    return drawing
