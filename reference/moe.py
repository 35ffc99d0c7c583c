"""Mixture of experts: many feed-forward networks, of which a router picks a few for each token.

    probability[t] = softmax over n of (router[n] . x[t])
    weight[t, n]   = probability[t, n] if n is among the top_k most probable experts of token t, else 0
    weight[t]      = weight[t] / (sum over n of weight[t, n])                             if norm_topk_prob
    y[t]           = sum over n of weight[t, n] * down[n] . silu_and_mul(gate_up[n] . x[t])

Why: a network's knowledge grows with its weights, its cost with the weights that a token is multiplied with. With N
experts of which a token uses top_k, there are N / top_k times as many weights at the same cost. An expert with weight 0
adds nothing, so an engine sorts tokens by expert and leaves it out. Here every expert computes every token.

Why norm_topk_prob: the chosen probabilities sum to less than 1, by an amount that varies from token to token; dividing
by their sum gives every token the same total. Models are trained with and without it, and the checkpoint says which.

Letters: T tokens, N experts, E hidden size, F intermediate size of one expert.
Paper: Shazeer et al. 2017 (arXiv 1701.06538); Qwen3 technical report (arXiv 2505.09388).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reference.silu_and_mul import silu_and_mul


def moe(
    hidden_states: Float[Tensor, "T E"],
    router_weight: Float[Tensor, "N E"],
    gate_up_proj: Float[Tensor, "N 2*F E"],
    down_proj: Float[Tensor, "N E F"],
    top_k: int,
    norm_topk_prob: bool,
) -> Float[Tensor, "T E"]:
    """The weighted sum of each token's top_k experts. Of equally probable experts, the lower number is chosen.

    Three experts; expert n has gate 100 x (silu is the identity there), up x and down n, so it computes n * 100 x * x.
    For x = 1 the router's logits are ln 1, ln 2, ln 5, the probabilities 1/8, 2/8, 5/8; experts 1 and 2 are chosen:

    >>> router = torch.tensor([[1.0], [2.0], [5.0]]).log()
    >>> gate_up, down = torch.tensor([[100.0], [1.0]]).repeat(3, 1, 1), torch.arange(3.0).view(3, 1, 1)
    >>> moe(torch.ones(1, 1), router, gate_up, down, top_k=2, norm_topk_prob=False)  # 2/8 * 100 + 5/8 * 200
    tensor([[150.]])
    >>> moe(torch.ones(1, 1), router, gate_up, down, top_k=2, norm_topk_prob=True)  # 2/7 * 100 + 5/7 * 200
    tensor([[171.4286]])
    """
    probability = (hidden_states @ router_weight.T).softmax(dim=-1, dtype=torch.float64)  # [T, N]
    chosen = probability.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weight = torch.zeros_like(probability).scatter(1, chosen, probability.gather(1, chosen))
    if norm_topk_prob:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    output = torch.zeros_like(hidden_states)
    for n in range(len(router_weight)):
        expert_output = silu_and_mul(hidden_states @ gate_up_proj[n].T) @ down_proj[n].T
        output = output + weight[:, n, None].to(output.dtype) * expert_output
    return output


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
