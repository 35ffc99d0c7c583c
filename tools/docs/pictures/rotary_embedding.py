"""RoPE's rotation: the vector (1, 0) in three pairs of a head, after rotary_embedding() at positions 0 to 5.

Below, a query and a key that are two positions apart enclose the same angle wherever they are, so attention sees
distances.
"""

import torch

from reference.rotary_embedding import rotary_embedding
from tools.docs.svg import Drawing

NUM_PAIRS, THETA = 3, 30.0
PLACES = ((2, 0), (3, 1), (5, 3))  # positions of a query and of a key


def draw() -> Drawing:
    radius, step = 46, 124
    drawing = Drawing(372, 322, "Pairs of coordinates turn with the position")
    for pair in range(NUM_PAIRS):
        x, y = 62 + pair * step, 78
        drawing.text(x, 14, f"pair {pair}: {('fast', 'slower', 'slow')[pair]}", "bold")
        drawing.circle(x, y, radius)
        for position in range(6):
            dx, dy = turned(pair, position)
            drawing.arrow((x, y), (x + radius * dx, y - radius * dy), look="abcd"[pair])
            if pair < 2 or position in (0, 5):
                drawing.text(x + (radius + 9) * dx, y - (radius + 9) * dy + 4, position, "small")
    drawing.text(8, 172, "pair 0 of a query and a key, and q·k", "bold", "start")
    for number, (query, key) in enumerate(PLACES):
        x, y = 62 + number * step, 240
        drawing.circle(x, y, radius)
        for name, position, look in (("q", query, "a"), ("k", key, "b")):
            dx, dy = turned(0, position)
            drawing.arrow((x, y), (x + radius * dx, y - radius * dy), look=look)
            drawing.text(x + (radius + 9) * dx, y - (radius + 9) * dy + 4, name, f"{look} bold")
        (qx, qy), (kx, ky) = turned(0, query), turned(0, key)
        drawing.text(x, 316, f"q at {query}, k at {key}: {qx * kx + qy * ky:.2f}", "small")
    return drawing


def turned(pair: int, position: int) -> tuple[float, float]:
    """The vector (1, 0) of a pair at a position. Coordinates i and i + D / 2 of a head are a pair."""
    x = torch.zeros(1, 1, 2 * NUM_PAIRS, dtype=torch.float64)
    x[0, 0, pair] = 1
    y = rotary_embedding(torch.tensor([position]), x, THETA)[0, 0]
    return float(y[pair]), float(y[pair + NUM_PAIRS])
