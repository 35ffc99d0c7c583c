"""SiLU and multiply: one half of a vector, made smooth and nearly one-sided, decides how much of the other half passes.

    silu(g) = g / (1 + exp(-g))
    y[f]    = silu(x[f]) * x[f + F]          for f in 0 .. F - 1

Why: a linear layer followed by a linear layer is a linear layer, so a function between them must be nonlinear. Here it
is a gate: silu(g) is about g for large g and about 0 for very negative g, without the corner of max(g, 0), and it
scales the "up" half, feature by feature. In the paper, gated networks learn better than ungated ones with as many
weights.

Why one input: gate_proj and up_proj read the same vector, so an engine keeps them as one matrix (gate_up_proj), whose
output is the gate, then the up half. This function is computed between that matrix and down_proj.

Letters: T tokens, F intermediate size.
Paper: Shazeer 2020 (arXiv 2002.05202), where it is called SwiGLU.
"""

from jaxtyping import Float
from torch import Tensor


def silu_and_mul(x: Float[Tensor, "... 2*F"]) -> Float[Tensor, "... F"]:
    """Return silu(first half) * second half.

    Gates 0 and ln 3 = 1.0986, ups 5 and 4: silu(0) = 0, and silu(ln 3) = ln 3 / (1 + 1/3) = 3/4 ln 3, times 4:

    >>> import torch
    >>> silu_and_mul(torch.tensor([0.0, 1.0986, 5.0, 4.0]))
    tensor([0.0000, 3.2958])
    """
    gate, up = x.chunk(2, dim=-1)
    silu = gate / (1 + (-gate).exp())
    return silu * up


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
