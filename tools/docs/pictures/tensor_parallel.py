"""Column and row parallel shards on two ranks: rank 0 holds the blue parts, rank 1 the orange ones.

The column-parallel layer leaves its output cut as the row-parallel layer needs its input. Each rank computes a partial
sum, and one all-reduce adds them. The numbers are those of column_parallel_linear() and row_parallel_linear().
"""

import torch

from reference.tensor_parallel import column_parallel_linear, row_parallel_linear
from tools.docs.svg import Drawing

X = torch.tensor([[1.0, 2.0]])
W1 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])  # [4 outputs, 2 inputs]
W2 = torch.tensor([[1.0, 2.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0]])  # [2 outputs, 4 inputs]
CELL = 25


def draw() -> Drawing:
    hidden = column_parallel_linear(X, W1, None, tp_size=2)
    shards = W2.chunk(2, dim=1)
    partial = [row_parallel_linear([y], shard, None) for y, shard in zip(hidden, shards, strict=True)]
    output = row_parallel_linear(hidden, W2, None)
    drawing = Drawing(372, 330, "A column-parallel layer, then a row-parallel layer, on two ranks")
    drawing.text(8, 16, "column parallel: W1 is cut by outputs", "bold", "start")
    for rank in range(2):
        y, look = 50 + 64 * rank, "ab"[rank]
        drawing.text(8, y + 28, f"rank {rank}", f"{look} bold", "start")
        _matrix(drawing, 66, y + 12, X, "free", "x" if rank == 0 else "")
        drawing.text(132, y + 29, "·")
        _matrix(drawing, 148, y, W1.chunk(2)[rank].T, look, "W1'" if rank == 0 else "")
        drawing.text(216, y + 29, "=")
        _matrix(drawing, 236, y + 12, hidden[rank], look, "y" if rank == 0 else "")
    drawing.text(8, 200, "row parallel: W2 is cut by inputs", "bold", "start")
    for rank in range(2):
        y, look = 222 + 64 * rank - 8, "ab"[rank]
        drawing.text(8, y + 28, f"rank {rank}", f"{look} bold", "start")
        _matrix(drawing, 66, y + 12, hidden[rank], look)
        drawing.text(132, y + 29, "·")
        _matrix(drawing, 148, y, shards[rank].T, look)
        drawing.text(216, y + 29, "=")
        _matrix(drawing, 236, y + 12, partial[rank], look)
        drawing.arrow((290, y + 25), (318, 268 - 10 + 16 * rank))
    _matrix(drawing, 320, 258, output, "c")
    drawing.text(345, 300, "all-reduce", "c small")
    return drawing


def _matrix(drawing: Drawing, x: float, y: float, values: torch.Tensor, look: str, name: str = "") -> None:
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            drawing.box(x + CELL * column, y + CELL * row, CELL, CELL, look, f"{value:g}")
    if name:
        drawing.text(x + CELL * len(values[0]) / 2, y - 6, name, "faint small")
