"""Shared prefix: sequences that begin alike read the keys of the beginning once, and each reads its own keys alone.

    (output_p, lse_p) = attention of the query to the shared keys,   lse = log(sum over keys of exp(score))
    (output_s, lse_s) = attention of the query to the sequence's own keys
    output = (exp(lse_p) * output_p + exp(lse_s) * output_s) / (exp(lse_p) + exp(lse_s))

Why it is right: attention is a weighted mean of values, with weights exp(score) / sum of exp(score). The mean over two
sets of keys is the mean of the two means, each weighted with its set's sum of weights, which is exp(lse).

Why it helps: decode reads every key of every sequence and computes little with each, so reading is what takes time. The
prefix cache gives sequences with equal beginnings the same blocks. One program can then read a shared key once, for the
queries of many sequences.

Letters: B sequences, H query heads, K key/value heads, D head_dim, S keys.
Paper: Juravsky et al. 2024 (arXiv 2402.05099, "Hydragen").
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.slot_mapping import slot_mapping


def shared_prefix_attention(
    query: Float[Tensor, "B H D"],
    k_cache: Float[Tensor, "num_blocks block_size K D"],
    v_cache: Float[Tensor, "num_blocks block_size K D"],
    block_tables: Int[Tensor, "B max_blocks"],
    context_lens: Int[Tensor, "B"],
    shared_lens: Int[Tensor, "B"],
    scale: float | None = None,
) -> Float[Tensor, "B H D"]:
    """Attention of one query a sequence, computed over its first shared_lens[b] keys and over the others, and merged.

    Blocks of 1 slot with the values 1, 2 and 6; the sequences share block 0. Queries of zero take the mean:

    >>> v_cache = torch.tensor([1.0, 2.0, 6.0]).double().view(3, 1, 1, 1)
    >>> k_cache, query = torch.zeros_like(v_cache), torch.zeros(2, 1, 1).double()
    >>> block_tables, context_lens = torch.tensor([[0, 1, 2], [0, 2, -1]]), torch.tensor([3, 2])
    >>> shared_prefix_attention(query, k_cache, v_cache, block_tables, context_lens, torch.tensor([1, 1])).flatten()
    tensor([3.0000, 3.5000], dtype=torch.float64)
    """
    outputs = []
    for b in range(len(query)):
        positions = torch.arange(int(context_lens[b]), device=query.device)
        slots = slot_mapping(positions, block_tables[b], k_cache.shape[1])
        keys, values = k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]
        shared = int(shared_lens[b])
        of_prefix = attend(query[b], keys[:shared], values[:shared], scale)
        of_rest = attend(query[b], keys[shared:], values[shared:], scale)
        outputs.append(merge(*of_prefix, *of_rest))
    return torch.stack(outputs)


def attend(
    query: Float[Tensor, "H D"], key: Float[Tensor, "S K D"], value: Float[Tensor, "S K D"], scale: float | None = None
) -> tuple[Float[Tensor, "H D"], Float[Tensor, "H"]]:
    """Output and log-sum-exp of one query over all keys; of no keys the log-sum-exp is -inf.

    >>> output, lse = attend(torch.zeros(1, 1), torch.zeros(2, 1, 1), torch.tensor([1.0, 5.0]).view(2, 1, 1))
    >>> output.item(), round(lse.exp().item(), 3)
    (3.0, 2.0)
    """
    num_heads, head_dim = query.shape
    group_size = num_heads // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    scores = torch.einsum("hd,shd->hs", query, key) * (head_dim**-0.5 if scale is None else scale)
    lse = scores.logsumexp(dim=1)
    return torch.einsum("hs,shd->hd", (scores - lse[:, None]).exp(), value), lse


def merge(
    output_p: Float[Tensor, "H D"], lse_p: Float[Tensor, "H"], output_s: Float[Tensor, "H D"], lse_s: Float[Tensor, "H"]
) -> Float[Tensor, "H D"]:
    """The attention over both sets of keys, of which at least one has keys.

    One key with the value 1 and two with the mean 4:

    >>> merge(torch.tensor([[1.0]]), torch.tensor([1.0]).log(), torch.tensor([[4.0]]), torch.tensor([2.0]).log())
    tensor([[3.]])
    """
    weight_p, weight_s = torch.stack([lse_p, lse_s]).softmax(dim=0)[:, :, None]
    return weight_p * output_p + weight_s * output_s


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
