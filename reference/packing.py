"""Packing: sequences of different lengths lie end to end in one tensor, and their boundaries are kept beside it.

    cu_seqlens[b] = length of sequence 0 + ... + length of sequence b - 1          (so cu_seqlens[0] = 0)
    sequence b    = packed[cu_seqlens[b] : cu_seqlens[b + 1]]

Why: the alternative, a rectangle padded to the longest sequence, computes on padding. Embeddings, norms, linear
layers and activations act on each token alone, so they take the packed tensor as it is and need no boundaries.
Attention is the one layer in which tokens meet: only it must know where a sequence ends.

Letters: T tokens of all sequences together, B sequences, t tokens of one, H query heads, K key/value heads, D head_dim.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from reference.attention import attention


def packing(sequences: Sequence[Shaped[Tensor, "t ..."]]) -> tuple[Shaped[Tensor, "T ..."], Int[Tensor, "B+1"]]:
    """Return (packed, cu_seqlens); cu_seqlens is int32, as attention kernels want it.

    >>> packing([torch.tensor([7, 8, 9]), torch.tensor([5]), torch.tensor([3, 4])])
    (tensor([7, 8, 9, 5, 3, 4]), tensor([0, 3, 4, 6], dtype=torch.int32))
    """
    ends = torch.tensor([len(sequence) for sequence in sequences]).cumsum(0)
    cu_seqlens = torch.cat([torch.tensor([0]), ends])
    return torch.cat(list(sequences)), cu_seqlens.to(sequences[0].device, torch.int32)


def unpacking(packed: Shaped[Tensor, "T ..."], cu_seqlens: Int[Tensor, "B+1"]) -> list[Shaped[Tensor, "t ..."]]:
    """The inverse of packing.

    >>> unpacking(torch.tensor([7, 8, 9, 5, 3, 4]), torch.tensor([0, 3, 4, 6]))
    [tensor([7, 8, 9]), tensor([5]), tensor([3, 4])]
    """
    return [packed[start:end] for start, end in pairwise(cu_seqlens.tolist())]


def varlen_attention(
    query: Float[Tensor, "Tq H D"],
    key: Float[Tensor, "Tk K D"],
    value: Float[Tensor, "Tk K D"],
    cu_seqlens_q: Int[Tensor, "B+1"],
    cu_seqlens_k: Int[Tensor, "B+1"],
    scale: float | None = None,
) -> Float[Tensor, "Tq H D"]:
    """Attention on packed sequences: unpack, attend within each sequence, pack again.

    A sequence may have more keys than queries: its first keys were computed in an earlier step.

    >>> value = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1)  # sequence 0 has values (1), sequence 1 has (2, 6)
    >>> zeros, cu_seqlens = torch.zeros(3, 1, 1), torch.tensor([0, 1, 3])
    >>> varlen_attention(zeros, zeros, value, cu_seqlens, cu_seqlens).flatten()  # 1 | 2, mean of 2 and 6
    tensor([1., 2., 4.])
    """
    queries, keys, values = (
        unpacking(query, cu_seqlens_q),
        unpacking(key, cu_seqlens_k),
        unpacking(value, cu_seqlens_k),
    )
    return torch.cat([attention(q, k, v, scale) for q, k, v in zip(queries, keys, values, strict=True)])


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
