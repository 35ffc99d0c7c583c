"""block_hash against the xxhash package; block_manager against its stated policy of reuse.

test_scheduler_against_reference.py compares block_manager, scheduler and postprocess with the engine's, step by step
over drawn runs. The engine's have tests by case, and laws of their own in tests/support/engine_machine.py.
"""

import struct

import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from reference.block_hash import block_hash, xxh64
from reference.block_manager import BlockManager
from tests.support.counts import count_comparisons


@given(data=st.binary(max_size=200), seed=st.integers(0, 2**64 - 1))
def test_xxh64_equals_the_package(data: bytes, seed: int) -> None:
    assert xxh64(data, seed) == xxhash.xxh64_intdigest(data, seed)
    count_comparisons("reference: xxh64 against the package")


@example(token_ids=[1, 2], parent=None)  # which is not a parent of 0
@given(token_ids=st.lists(st.integers(0, 2**31), min_size=1, max_size=40), parent=st.none() | st.integers(0, 2**64 - 1))
def test_block_hash_is_xxh64_of_parent_and_tokens(token_ids: list[int], parent: int | None) -> None:
    digest = xxhash.xxh64(b"" if parent is None else struct.pack("<Q", parent))
    for token in token_ids:
        digest.update(struct.pack("<q", token))
    assert block_hash(token_ids, parent) == digest.intdigest()


def filled(pool: BlockManager, seq_id: str, token_ids: list[int]) -> BlockManager:
    return pool.allocate(seq_id, token_ids)[0].computed(seq_id, token_ids, len(token_ids))


def test_what_holds_nothing_hittable_is_reused_first_then_the_least_recently_freed_and_tails_before_heads() -> None:
    pool = filled(filled(BlockManager(6, 2), "a", [1, 2, 3, 4, 5]), "b", [6, 7])
    assert pool.tables == {"a": (0, 1, 2), "b": (3,)}
    pool = pool.deallocate("b").deallocate("a")
    assert pool.reuse_order() == [4, 5, 2, 3, 1, 0]


def test_a_prompt_that_was_cached_whole_shares_all_blocks_and_leaves_one_token() -> None:
    """D05, D14."""
    prompt = [0, 1, 2, 3]
    pool, num_cached = filled(BlockManager(4, 2), "a", prompt).allocate("b", prompt)
    assert num_cached == 3
    assert pool.tables["b"] == pool.tables["a"]
