"""MoE routing: the weight that each token gives each of four experts, of which moe() takes the two most probable.

Below, the same tokens are sorted by expert. An engine computes in this order: each expert once, on its own tokens only.
"""

import torch

from reference.moe import moe
from tools.docs.svg import Drawing

TOKENS = ["In", "the", "beginning", "God", "created", "the", "heaven"][:6]
NUM_EXPERTS, TOP_K = 4, 2


def draw() -> Drawing:
    weight = weights()
    left, cell, row = 92, 62, 28
    drawing = Drawing(
        left + NUM_EXPERTS * cell + 12, 30 + row * len(TOKENS) + 112, "Which experts compute which tokens"
    )
    for n in range(NUM_EXPERTS):
        drawing.text(left + n * cell + cell / 2, 18, f"expert {n}", f"{'abcd'[n]} small")
    for t, token in enumerate(TOKENS):
        y = 26 + row * t
        drawing.text(left - 26, y + 18, token, "small", "end")
        drawing.text(left - 8, y + 18, t, "faint small", "end")
        for n in range(NUM_EXPERTS):
            chosen = weight[t][n] > 0
            label = f"{weight[t][n]:.2f}" if chosen else ""
            drawing.box(left + n * cell, y, cell, row, "abcd"[n] if chosen else "free", label)
    top = 26 + row * len(TOKENS) + 30
    drawing.text(8, top, "tokens, sorted by expert", "bold", "start")
    x = 8.0
    for n in range(NUM_EXPERTS):
        tokens = [t for t in range(len(TOKENS)) if weight[t][n] > 0]
        for t in tokens:
            drawing.box(x, top + 10, 26, 26, "abcd"[n], t)
            x += 26
        if tokens:
            middle = x - 13 * len(tokens)
            drawing.arrow((middle, top + 38), (middle, top + 56), look="abcd"[n])
            drawing.text(middle, top + 70, f"expert {n}", f"{'abcd'[n]} small")
        x += 10
    return drawing


def weights() -> list[list[float]]:
    """[token][expert], after the top_k. Expert n answers 1 in coordinate n, so the output of moe() is the weights."""
    generator = torch.Generator().manual_seed(45)
    x = torch.randn(len(TOKENS), NUM_EXPERTS, generator=generator, dtype=torch.float64)
    x[:, 0] = 1
    router = 1.5 * torch.randn(NUM_EXPERTS, NUM_EXPERTS, generator=generator, dtype=torch.float64)
    gate_up = torch.zeros(NUM_EXPERTS, 2, NUM_EXPERTS, dtype=torch.float64)
    gate_up[:, 0, 0], gate_up[:, 1, 0] = 100, 0.01  # silu(100) * 0.01 = 1
    down = torch.eye(NUM_EXPERTS, dtype=torch.float64).unsqueeze(-1)
    return moe(x, router, gate_up, down, TOP_K, norm_topk_prob=True).tolist()
