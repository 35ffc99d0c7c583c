"""The race of exponentials: token v arrives at the time e[v] / p[v], and the first to arrive is the next token.

p is the softmax of the logits that top_k = 4 left; a dropped token does not run. On the right: how many of 1000 races
each token won, one race for each position. They are near 1000 p.
"""

import torch

from reference.sampling import allowed_mask, exponential_noise, sampling
from tools.docs.svg import Drawing

LOGITS = {"heaven": 2.6, "light": 2.3, "earth": 1.6, "waters": 0.7, "deep": -0.4}
TOP_K, SEED, POSITION = 4, 7, 26


def draw() -> Drawing:
    logits = torch.tensor(list(LOGITS.values()), dtype=torch.float64)
    keep = allowed_mask(logits, TOP_K)
    p = logits.where(keep, -torch.inf).softmax(dim=0)
    arrival = exponential_noise(SEED, POSITION, len(logits)) / p
    winner = sampling(logits, top_k=TOP_K, seed=SEED, position=POSITION)
    won = [sampling(logits, top_k=TOP_K, seed=SEED, position=position) for position in range(1000)]
    left, right, row = 106, 306, 34
    unit = (right - left) / float(arrival[keep].max())
    drawing = Drawing(372, 34 + row * len(LOGITS) + 30, "Tokens race; the first to arrive is the next token")
    for x, text in ((8, "token"), (62, "p"), (left, "arrives at e / p"), (right + 16, "races won")):
        drawing.text(x, 16, text, "faint small", "start")
    for v, word in enumerate(LOGITS):
        y = 34 + row * v
        drawing.text(8, y + 16, word, "bold" if v == winner else "" if keep[v] else "faint", "start")
        if not keep[v]:
            drawing.text(left + 8, y + 16, "dropped by top_k", "faint small", "start")
            drawing.text(right + 58, y + 16, won.count(v), "faint small", "end")
            continue
        drawing.text(62, y + 16, f"{float(p[v]):.2f}", "small", "start")
        end = left + unit * float(arrival[v])
        drawing.arrow((left, y + 12), (end, y + 12), look="b" if v == winner else "a")
        label = (min(end, right - 14) + 2, y + 3) if end > right - 40 else (end + 6, y + 16)
        drawing.text(*label, f"{float(arrival[v]):.1f}", "small", "end" if end > right - 40 else "start")
        drawing.text(right + 58, y + 16, won.count(v), "bold small" if v == winner else "small", "end")
    bottom = 34 + row * len(LOGITS)
    drawing.line((left, 28), (left, bottom))
    drawing.text(
        left,
        bottom + 18,
        f"position {POSITION}, seed {SEED}: {list(LOGITS)[winner]} is the next token",
        "faint small",
        "start",
    )
    return drawing
