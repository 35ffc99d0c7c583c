"""The causal mask: the weight of each key (column) for each query (row), as attention() computes it.

The first five of eight tokens were computed before. A query sees its own token and those before it.
"""

import torch

from reference.attention import attention
from tools.docs.svg import Drawing

TOKENS = ["In", "the", "beginning", "God", "created", "the", "heaven", "and"]
NUM_QUERIES = 3


def draw() -> Drawing:
    num_keys, cell, left, top = len(TOKENS), 33, 88, 70
    width, height = left + num_keys * cell + 8, top + NUM_QUERIES * cell + 30
    drawing = Drawing(width, height, "Which key each query sees, and its weight")
    weight = weights()
    for j, token in enumerate(TOKENS):
        drawing.text(left + j * cell + cell / 2, top - 8, j, "faint small")
        drawing.text(left + j * cell + cell / 2, top - 24 - 14 * (j % 2), token, "small")
    drawing.text(left - 8, top - 8, "position", "faint small", "end")
    for i in range(NUM_QUERIES):
        position = num_keys - NUM_QUERIES + i
        drawing.text(left - 8, top + i * cell + cell / 2 + 4, f"query {i}: {TOKENS[position]}", "small", "end")
        for j in range(num_keys):
            sees = weight[i][j] > 0
            look = "b" if j == position else "a" if sees else "free"
            label = f"{weight[i][j]:.2f}".removeprefix("0") if sees else ""
            drawing.box(left + j * cell, top + i * cell, cell, cell, look, label)
    end = left + (num_keys - NUM_QUERIES) * cell
    bottom = top + NUM_QUERIES * cell + 18
    drawing.text((left + end) / 2, bottom, "keys from the cache", "faint small")
    drawing.text((end + left + num_keys * cell) / 2, bottom, "keys of this step", "faint small")
    return drawing


def weights() -> list[list[float]]:
    """[query][key]: with one-hot values, attention's output is its weights."""
    generator = torch.Generator().manual_seed(5)
    num_keys = len(TOKENS)
    key = torch.randn(num_keys, 1, num_keys, generator=generator, dtype=torch.float64)
    query = torch.randn(NUM_QUERIES, 1, num_keys, generator=generator, dtype=torch.float64)
    return attention(query, key, torch.eye(num_keys, dtype=torch.float64).unsqueeze(1))[:, 0].tolist()
