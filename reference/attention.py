"""Attention: each token reads the values of the tokens before it, weighted by how well its query matches their keys.

    score[i, h, j]  = scale * (sum over d of query[i, h, d] * key[j, h // G, d])
    weight[i, h, j] = exp(score[i, h, j]) / (sum of exp(score[i, h, j']) over every j' that query i sees)
    output[i, h, d] = sum over the j that query i sees of weight[i, h, j] * value[j, h // G, d]

    query i sees key j  when  j <= k_len - q_len + i

Why the inequality: the queries are the last q_len tokens of a text of k_len tokens, so query i is at position
k_len - q_len + i, and a token sees itself and the tokens before it, never those after it. Hence a token that is
appended to a text does not change what was computed before: this is why an engine can cache keys and values.

Why the scale: a sum of D products of independent terms of variance 1 has variance D. Dividing by sqrt(D) brings it
back to 1, so that the softmax neither saturates nor flattens as heads grow.

Why h // G: with grouped-query attention, G neighbouring query heads read the same key/value head, so the cache is
G times smaller. G = 1 is multi-head attention, K = 1 is multi-query attention.

Letters: q queries, k keys, H query heads, K key/value heads, G = H // K, D head_dim.
Papers: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; Ainslie et al. 2023 (arXiv 2305.13245).
"""

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor


def attention(
    query: Float[Tensor, "q H D"],
    key: Float[Tensor, "k K D"],
    value: Float[Tensor, "k K D"],
    scale: float | None = None,
) -> Float[Tensor, "q H D"]:
    """Causal attention of the last q tokens of one sequence; scale is D ** -0.5 unless given.

    With queries of zero all scores are equal, so each token gets the mean of the values it sees. Here two queries
    sit at positions 1 and 2 of three, and get the means of (3, 5) and of (3, 5, 10):

    >>> value = torch.tensor([3.0, 5.0, 10.0], dtype=torch.float64).view(3, 1, 1)
    >>> attention(torch.zeros(2, 1, 1).double(), torch.zeros(3, 1, 1).double(), value).flatten()
    tensor([4., 6.], dtype=torch.float64)

    A first token sees only itself, whatever its query is. Query heads 0 and 1 share kv head 0, 2 and 3 share 1:

    >>> attention(torch.randn(1, 4, 1), torch.randn(1, 2, 1), torch.tensor([[[7.0], [8.0]]])).flatten()
    tensor([7., 7., 8., 8.])
    """
    q_len, num_heads, head_dim = query.shape
    k_len, num_kv_heads, _ = key.shape
    if scale is None:
        scale = 1 / sqrt(head_dim)
    key = key.repeat_interleave(num_heads // num_kv_heads, dim=1)  # now head h of [k, H, D] is kv head h // G
    value = value.repeat_interleave(num_heads // num_kv_heads, dim=1)

    j = torch.arange(k_len, device=query.device)
    position = torch.arange(k_len - q_len, k_len, device=query.device)
    sees = j[None, :] <= position[:, None]  # [q, k]

    score = scale * torch.einsum("ihd,jhd->hij", query, key)
    weight = score.masked_fill(~sees, -torch.inf).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weight, value)


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
