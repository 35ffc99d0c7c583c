"""Slot mapping: where in the KV cache the token at a given position of a sequence is stored.

    slot = block_table[position // block_size] * block_size + position % block_size

Why: the cache is cut into blocks of equal size, and a sequence owns any blocks, in any order, taken one at a time as
it grows. So memory never fragments, at most block_size - 1 slots of a sequence are empty, and two sequences that begin
alike can name the same block in their tables. block_table[n] is the block that holds the sequence's n-th run of
block_size tokens. It works like an operating system's page table: block = page, position = virtual address, slot =
physical address.

Letters: T tokens. position counts from 0, so the last token of a sequence of n tokens has position n - 1.
Paper: Kwon et al. 2023 (arXiv 2309.06180), section 4.
"""

from jaxtyping import Int
from torch import Tensor


def slot_mapping(positions: Int[Tensor, "T"], block_table: Int[Tensor, "n"], block_size: int) -> Int[Tensor, "T"]:
    """The slots of these positions of one sequence.

    Blocks of 4 slots; the sequence's tokens 0-3 lie in block 7 (slots 28-31), its tokens 4-7 in block 2 (slots 8-11):

    >>> import torch
    >>> slot_mapping(torch.tensor([0, 1, 3, 4, 6]), torch.tensor([7, 2]), block_size=4)
    tensor([28, 29, 31,  8, 10])
    """
    block = block_table[positions // block_size]
    offset = positions % block_size
    return block * block_size + offset


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
