"""SharedPrefixes: which sequences of a decode step begin with the same blocks, for kernels.shared_prefix_attention."""

from dataclasses import dataclass

import numpy as np

from nanovllm.context import SEQS_PER_TILE

MIN_SAVED_TOKENS = 2**15  # keys: on an H200, fewer do not pay for another kernel


@dataclass(frozen=True)
class SharedPrefixes:
    """Tiles of SEQS_PER_TILE sequences, consecutive in `order`, and how many of their first tokens a tile shares.

    order: [num_seqs] int32, a permutation of the rows of the block tables, which brings equal beginnings together.
    lens: [num_seqs] int32, by row, not by place in the order: a multiple of the block size, equal within a tile, less
        than the sequence's context length; 0 where nothing is shared.
    """

    order: np.ndarray
    lens: np.ndarray


def find_shared_prefixes(
    block_tables: np.ndarray, context_lens: np.ndarray, block_size: int, min_saved_tokens: int | None = None
) -> SharedPrefixes | None:
    """The shared prefixes of a decode step; None if sharing saves reading fewer than min_saved_tokens keys
    (MIN_SAVED_TOKENS by default).

    block_tables: [num_seqs, max_blocks] int32, context_lens: [num_seqs] int32 or int64, the new token included. Equal
    block ids hold equal tokens, since only the prefix cache gives one block to two sequences.

    In the lexicographic order of the tables, what the first and the last row of a tile have in common at their
    beginning, all rows between them have too.
    """
    min_saved_tokens = MIN_SAVED_TOKENS if min_saved_tokens is None else min_saved_tokens
    num_seqs = len(block_tables)
    first_blocks = np.sort(block_tables[:, 0])
    if not (first_blocks[1:] == first_blocks[:-1]).any():
        return None
    order = np.lexsort(block_tables.T[::-1])
    first = np.arange(0, num_seqs, SEQS_PER_TILE)
    last = np.minimum(first + SEQS_PER_TILE, num_seqs) - 1
    is_equal = block_tables[order[first]] == block_tables[order[last]]
    num_equal = np.logical_and.accumulate(is_equal, axis=1).sum(axis=1)
    # The newest token is stored in this step, so its block is the sequence's own: blocks before it may be shared.
    num_before = np.minimum.reduceat((context_lens[order] - 1) // block_size, first)
    tile_lens = np.where(last > first, np.minimum(num_equal, num_before) * block_size, 0)
    if ((last - first) * tile_lens).sum() < min_saved_tokens:
        return None
    lens = np.empty(num_seqs, dtype=np.int32)
    lens[order] = np.repeat(tile_lens, last - first + 1)
    return SharedPrefixes(order.astype(np.int32), lens)
