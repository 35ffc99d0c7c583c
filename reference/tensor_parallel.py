"""Tensor parallelism: every rank holds a slice of each matrix, and what the slices compute adds up to the whole layer.

    column parallel   y = [x W_0' + b_0 | x W_1' + b_1 | ...]        rank r has some of the outputs: rows W_r, b_r
    row parallel      y = x_0 W_0' + x_1 W_1' + ... + b              rank r has some of the inputs: columns W_r
    vocabulary        y = row of the one rank whose range holds the token, 0 from all others, summed
    sampling          the best of the tokens that are the best of each rank's range

Why it is right: a matrix product is a list of dot products (cut the list: column) and each is a sum (cut the sum: row).
Why in this order: a column-parallel layer leaves its output cut exactly as a row-parallel layer needs its input. The
functions between the two (attention, silu_and_mul) compute each head or feature alone, so each rank computes its own.
So attention (qkv_proj, o_proj) and the feed-forward (gate_up_proj, down_proj) cost one all-reduce each.
Why one rank adds the bias of a row-parallel layer: the ranks' outputs are summed, and it would count n times.

With more ranks than key/value heads, several ranks hold the same head: rank r has kv head r * K // tp_size.

Letters: T tokens, I input features, O output features, V vocabulary, E hidden size. W' is W transposed.
Paper: Shoeybi et al. 2019 (arXiv 1909.08053).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def column_parallel_linear(
    x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None, tp_size: int
) -> list[Float[Tensor, "T O/n"]]:
    """The output of each rank; side by side they are x W' + b. The ranks do not communicate.

    >>> column_parallel_linear(torch.tensor([[2.0]]), torch.tensor([[1.0], [10.0]]), torch.tensor([5.0, 6.0]), 2)
    [tensor([[7.]]), tensor([[26.]])]
    """
    weights = weight.chunk(tp_size, dim=0)
    biases = [torch.zeros(())] * tp_size if bias is None else bias.chunk(tp_size)
    return [x @ weights[rank].T + biases[rank] for rank in range(tp_size)]


def all_reduce(xs: list[Float[Tensor, "T E"]]) -> Float[Tensor, "T E"]:
    """The sum over ranks, which every rank gets; rank r has xs[r].

    >>> all_reduce([torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])])
    tensor([[11., 22.]])
    """
    return sum(xs[1:], xs[0])


def row_parallel_linear(
    xs: list[Float[Tensor, "T I/n"]], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "T O"]:
    """The sum over ranks (all-reduce); rank r has the input xs[r]. Equal to [xs side by side] W' + b.

    >>> row_parallel_linear([torch.tensor([[2.0]]), torch.tensor([[3.0]])], torch.tensor([[1.0, 10.0]]), None)
    tensor([[32.]])
    """
    weights = weight.chunk(len(xs), dim=1)
    partial = [x @ weights[rank].T for rank, x in enumerate(xs)]
    return all_reduce(partial) + (0 if bias is None else bias)


def vocab_parallel_embedding(token_ids: Int[Tensor, "T"], weight: Float[Tensor, "V E"], tp_size: int) -> Tensor:
    """The sum over ranks, [T, E]; rank r has the rows r * V/n .. (r + 1) * V/n - 1 of the weight.

    >>> vocab_parallel_embedding(torch.tensor([3, 0]), torch.tensor([[10.0], [11.0], [12.0], [13.0]]), tp_size=2)
    tensor([[13.],
            [10.]])
    """
    output = torch.zeros(len(token_ids), weight.shape[1], dtype=weight.dtype)
    for rank, rows in enumerate(weight.chunk(tp_size, dim=0)):
        local = token_ids - rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        output = output + torch.where(mine[:, None], rows[local.where(mine, 0)], 0)
    return output


def vocab_parallel_argmax(scores: Float[Tensor, "V"], tp_size: int) -> int:
    """The token with the largest score, the lowest id among equals; rank r has the scores r * V/n .. (r + 1) * V/n - 1.

    Each rank sends one token and one score instead of V/n logits. That suffices, since a draw is an argmax too: see
    reference.sampling.

    >>> vocab_parallel_argmax(torch.tensor([1.0, 3.0, 2.0, 3.0]), tp_size=2)
    1
    """
    size = len(scores) // tp_size
    best = [rank * size + int(scores[rank * size : (rank + 1) * size].argmax()) for rank in range(tp_size)]
    return max(best, key=lambda token: float(scores[token]))  # max takes the first of equals


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
