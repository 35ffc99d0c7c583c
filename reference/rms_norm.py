"""RMS norm: bring every token's vector to length sqrt(E), then stretch each direction by a learned factor.

    rms(x) = sqrt((x[0] ** 2 + ... + x[E - 1] ** 2) / E + eps)
    y[e]   = x[e] / rms(x) * weight[e]

Why: layers add to a running sum (the residual stream), which grows with depth. Each layer reads the stream divided by
its length, so its inputs have the same length at every depth. Multiplying x by a constant changes nothing (up to eps).
Layer norm also subtracts the mean; the paper found no loss without it. eps avoids a division by zero for the zero
vector.

Why the residual is here: a decoder always adds a layer's output to the stream and then normalises the sum for the next
layer. Doing both at once reads memory once instead of twice, so engines fuse them, and return the sum too.

Letters: T tokens, E hidden size (or head_dim, where queries and keys are normalised head by head).
Paper: Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm(
    x: Float[Tensor, "... E"],
    weight: Float[Tensor, "E"],
    eps: float = 1e-6,
    residual: Float[Tensor, "... E"] | None = None,
) -> Float[Tensor, "... E"] | tuple[Float[Tensor, "... E"], Float[Tensor, "... E"]]:
    """Return y; with a residual, (y of x + residual, x + residual). Squares are summed in float32 or wider.

    The mean of 1 and 49 is 25, so rms is 5:

    >>> rms_norm(torch.tensor([1.0, 7.0]), weight=torch.tensor([1.0, 10.0]), eps=0.0)
    tensor([ 0.2000, 14.0000])
    >>> rms_norm(torch.tensor([1.0, 3.0]), torch.ones(2), eps=0.0, residual=torch.tensor([0.0, 4.0]))
    (tensor([0.2000, 1.4000]), tensor([1., 7.]))
    """
    stream = x if residual is None else x + residual
    wide = stream.to(torch.promote_types(x.dtype, torch.float32))
    rms = (wide.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    y = (wide / rms).to(x.dtype) * weight
    return y if residual is None else (y, stream)


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
