"""Paged attention: attention whose keys and values are first looked up in the cache, block by block.

    slots[b]  = slot_mapping(0 .. context_lens[b] - 1, block_tables[b])
    output[b] = attention(queries of sequence b, k_cache[slots[b]], v_cache[slots[b]])

Why it is right: attention is a sum over keys, and a sum does not depend on where its terms are stored. The definition
here gathers the keys and values into one tensor; a kernel follows the block table and copies nothing. Blocks that the
table does not name, and slots of the last block beyond context_len, are not read: they may hold another sequence's
tokens.

One formula serves every step of the engine. Each step stores its tokens' keys first, and context_lens[b] counts all
the tokens of sequence b that are in the cache by then:
    decode         one query a sequence, the token sampled last
    prefill        context_lens[b] queries: nothing was cached
    chunk, prefix  fewer queries: an earlier chunk or request has cached the tokens before them
The queries of sequence b are the last of its context_lens[b] tokens, and attention() gives them the last positions.

Letters: T queries of all sequences, B sequences, H query heads, K key/value heads, D head_dim.
Paper: Kwon et al. 2023 (arXiv 2309.06180).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.attention import attention
from reference.packing import unpacking
from reference.slot_mapping import slot_mapping


def paged_attention(
    query: Float[Tensor, "T H D"],
    k_cache: Float[Tensor, "num_blocks block_size K D"],
    v_cache: Float[Tensor, "num_blocks block_size K D"],
    block_tables: Int[Tensor, "B max_blocks"],
    context_lens: Int[Tensor, "B"],
    cu_seqlens_q: Int[Tensor, "B+1"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "T H D"]:
    """Attention of packed queries to their sequences' cached keys. Without cu_seqlens_q: one query a sequence.

    Rows of block_tables may be padded with any value. A sequence of context_len 0, which pads a batch, yields zeros.

    Three blocks of 2 slots with the values 1 2 | 3 4 | 5 6. Sequence 0 has three tokens, in blocks 2 and 0, with the
    values 5 6 1; sequence 1 has two, in block 1. A query of zeros gives all its keys equal weight:

    >>> v_cache = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2, 1, 1)
    >>> k_cache, query = torch.zeros_like(v_cache), torch.zeros(2, 1, 1).double()
    >>> block_tables, context_lens = torch.tensor([[2, 0], [1, -1]]), torch.tensor([3, 2])
    >>> paged_attention(query, k_cache, v_cache, block_tables, context_lens).flatten().tolist()
    [4.0, 3.5]
    """
    block_size = k_cache.shape[1]
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(len(context_lens) + 1)
    outputs = []
    for b, query_b in enumerate(unpacking(query, cu_seqlens_q)):
        positions = torch.arange(int(context_lens[b]), device=query.device)
        slots = slot_mapping(positions, block_tables[b], block_size)
        outputs.append(attention(query_b, k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots], scale))
    return torch.cat(outputs)


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
