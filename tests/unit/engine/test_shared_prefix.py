"""find_shared_prefixes: by hand, and against the definition for drawn block tables."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.shared_prefix import SEQS_PER_TILE, find_shared_prefixes

BLOCK_SIZE = 4


def tables(*rows: list[int]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int32)


def lens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_the_block_of_the_newest_token_is_not_shared() -> None:
    found = find_shared_prefixes(tables([5, 6], [5, 6]), lens(8, 8), BLOCK_SIZE, 1)
    assert found is not None
    assert found.lens.tolist() == [4, 4]


def test_every_block_counts_in_the_order() -> None:
    """Otherwise the first and the last row of this tile would share two blocks, and the row between them would not."""
    found = find_shared_prefixes(tables([1, 5, 10], [1, 6, 11], [1, 5, 12]), lens(12, 12, 12), BLOCK_SIZE, 1)
    assert found is not None
    assert (found.order.tolist(), found.lens.tolist()) == ([0, 2, 1], [4, 4, 4])


def test_each_tile_shares_its_own_beginning_and_the_sum_must_save_enough() -> None:
    """The first tile has nothing in common, the second two blocks, the third is one sequence."""
    rows = [[row, 1] for row in range(SEQS_PER_TILE)] + [[100, 101, 200 + row] for row in range(SEQS_PER_TILE + 1)]
    saved = (SEQS_PER_TILE - 1) * 2 * BLOCK_SIZE
    context_lens = lens(*[9] * len(rows))
    found = find_shared_prefixes(tables(*rows), context_lens, BLOCK_SIZE, saved)
    assert found is not None
    assert found.lens.tolist() == [0] * SEQS_PER_TILE + [8] * SEQS_PER_TILE + [0]
    assert (found.order.dtype, found.lens.dtype) == (np.int32, np.int32)
    assert find_shared_prefixes(tables(*rows), context_lens, BLOCK_SIZE, saved + 1) is None
    assert find_shared_prefixes(tables(*rows), context_lens, BLOCK_SIZE) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=80), st.data())
def test_the_sequences_of_a_tile_have_the_blocks_of_their_shared_tokens_in_common(
    drawn: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """drawn: (which prefix, its blocks, own tokens) of each sequence. Blocks of its own have ids that no other has."""
    rows, context_lens = [], []
    for index, (prefix, num_blocks, num_own) in enumerate(drawn):
        own = range(1000 + 10 * index, 1000 + 10 * index + -(-num_own // BLOCK_SIZE))
        rows.append([100 * prefix + block for block in range(num_blocks)] + list(own))
        context_lens.append(num_blocks * BLOCK_SIZE + num_own)
    order = data.draw(st.permutations(range(len(rows))))
    block_tables = tables(*(rows[index] for index in order))
    found = find_shared_prefixes(block_tables, lens(*(context_lens[index] for index in order)), BLOCK_SIZE, 1)
    if found is None:
        return
    assert sorted(found.order.tolist()) == list(range(len(rows)))
    for start in range(0, len(rows), SEQS_PER_TILE):
        tile = found.order[start : start + SEQS_PER_TILE]
        (shared_len,) = set(found.lens[tile].tolist())
        assert shared_len % BLOCK_SIZE == 0
        num_shared = shared_len // BLOCK_SIZE
        assert len({tuple(block_tables[row, :num_shared].tolist()) for row in tile}) == 1
        assert all(shared_len < context_lens[order[row]] for row in tile)
        one_more = {tuple(block_tables[row, : num_shared + 1].tolist()) for row in tile}
        # Nothing longer is shared: a next block differs, or is the one of a sequence's newest token.
        assert len(tile) == 1 or len(one_more) > 1
