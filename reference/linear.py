"""Linear layer: every output feature is a weighted sum of the input features.

    y[t, n] = sum over k of x[t, k] * weight[n, k]  +  bias[n]

Why the weight is [output features, input features]: row n holds what makes output feature n, in the order in which
memory is read. So a matrix can be cut between outputs, and several matrices with the same input can lie on top of each
other as one (qkv_proj, gate_up_proj): the outputs of each are then a slice of the columns of y.

Why an engine has two kernels for one formula: with many tokens each weight is used many times, and arithmetic is what
takes time. With one token each weight is used once, and reading the weights is what takes time.

Letters: T tokens, N output features, K input features.
"""

from jaxtyping import Float
from torch import Tensor


def linear(
    x: Float[Tensor, "T K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"] | None = None
) -> Float[Tensor, "T N"]:
    """Return x W' + b.

    One token has the features 1 and 2. The first output is their sum, the second their difference, the third 10 plus
    twice the second feature:

    >>> import torch
    >>> weight = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 2.0]])
    >>> linear(torch.tensor([[1.0, 2.0]]), weight, torch.tensor([0.0, 0.0, 10.0]))
    tensor([[ 3., -1., 14.]])
    """
    y = (x[:, None, :] * weight[None, :, :]).sum(dim=-1)
    return y if bias is None else y + bias


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
