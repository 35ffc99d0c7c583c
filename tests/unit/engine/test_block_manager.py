"""BlockManager: what is shared, what is reused when, and where a sequence grows."""

import struct
from collections import OrderedDict
from collections.abc import Callable

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.block_manager import BlockManager, block_hash
from reference import block_hash as reference
from tests.support.counts import count_comparisons
from tests.support.scheduling import allocated, compute, computed, make_sequence


def weak_hash(tokens: list[int], parent: int | None) -> int:
    return sum(tokens) % 3


def no_hash(tokens: list[int], parent: int | None) -> int:
    return 0


def hits(manager: BlockManager, token_ids: list[int]) -> list[int]:
    return manager.find_cached_blocks(make_sequence(token_ids, manager.block_size))


every_hash = pytest.mark.parametrize("hash_function", [block_hash, weak_hash, no_hash])


# --- the hash ---


@given(tokens=st.lists(st.integers(0, 2**31), min_size=1, max_size=40), parent=st.none() | st.integers(0, 2**64 - 1))
def test_block_hash_equals_the_references(tokens: list[int], parent: int | None) -> None:
    assert block_hash(tokens, parent) == reference.block_hash(tokens, parent)
    count_comparisons("BlockManager: hashes against the reference")


def test_block_hash_is_xxh64_of_parent_and_tokens_as_8_bytes_each() -> None:
    first = xxhash.xxh64(struct.pack("<2q", 1, 2)).intdigest()
    assert block_hash([1, 2], None) == first
    for parent in (first, 0):  # 0 is a parent's hash as any other
        assert block_hash([3, 4], parent) == xxhash.xxh64(struct.pack("<Q2q", parent, 3, 4)).intdigest()


def test_every_block_is_hashed_once_in_a_sequences_life() -> None:
    calls = []

    def counted(tokens: list[int], parent: int | None) -> int:
        calls.append(tokens)
        return block_hash(tokens, parent)

    manager = BlockManager(20, 2, counted)
    seq = make_sequence([1, 2, 3, 4, 5], 2)
    for _ in range(3):
        manager.can_allocate(seq)
    manager.allocate(seq)
    for token in range(6, 12):
        compute(manager, seq)
        seq.append_token(token)
        manager.append(seq)
    manager.deallocate(seq)
    manager.allocate(seq)
    assert calls == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]


def test_a_block_is_hashed_with_the_hash_of_the_block_before_it() -> None:
    parents = []

    def recorded(tokens: list[int], parent: int | None) -> int:
        parents.append(parent)
        return 100 + len(parents)

    BlockManager(8, 2, recorded).can_allocate(make_sequence([1, 2, 3, 4, 5, 6], 2))
    assert parents == [None, 101, 102]


# --- sharing ---


def test_a_prefix_is_shared_block_by_block() -> None:
    manager = BlockManager(8, 2)
    first = computed(manager, [1, 2, 3, 4, 5])
    second = allocated(manager, [1, 2, 3, 4, 6, 7])
    assert second.block_table[:2] == first.block_table[:2]
    assert (second.num_cached_tokens, second.num_tokens_with_kv, second.num_cached_prompt_tokens) == (4, 4, 4)
    assert [manager.blocks[block_id].ref_count for block_id in first.block_table] == [2, 2, 1]
    assert manager.num_hit_blocks == 2
    third = allocated(manager, [1, 2, 9])
    assert manager.num_hit_blocks == 3
    manager.check_invariants([first, second, third])


@pytest.mark.parametrize("num_tokens", [2, 4, 8])
def test_a_prompt_cached_whole_leaves_one_token_to_compute_and_none_to_store(num_tokens: int) -> None:
    """D05, D14, D06: of a multiple of the block size, one token is computed, not a block."""
    manager, prompt = BlockManager(8, 2), list(range(num_tokens))
    first, second = computed(manager, prompt), allocated(manager, prompt)
    assert second.block_table == first.block_table
    assert (second.num_uncached_tokens, second.num_tokens_with_kv) == (1, num_tokens)


def test_blocks_are_hittable_once_their_keys_are_stored_and_not_before() -> None:
    manager = BlockManager(8, 2)
    seq = allocated(manager, [1, 2, 3, 4])
    assert hits(manager, [1, 2, 3, 4]) == []
    seq.num_cached_tokens = seq.num_tokens_with_kv = 3
    manager.cache_full_blocks(seq)
    assert hits(manager, [1, 2, 3, 4]) == seq.block_table[:1]


@every_hash
def test_a_hit_means_that_the_whole_prefix_is_equal(hash_function: Callable[..., int]) -> None:
    """D09: the second block holds the right tokens, the block before it the wrong ones."""
    manager = BlockManager(8, 2, hash_function)
    first, second = computed(manager, [1, 2, 3, 4]), computed(manager, [3, 0, 3, 4])
    assert first.block_table[1] != second.block_table[1]
    assert hits(manager, [1, 2, 3, 4]) == first.block_table
    assert hits(manager, [3, 0, 3, 4]) == second.block_table
    assert hits(manager, [2, 1, 3, 4]) == []
    assert hits(manager, [3, 4]) == []
    manager.check_invariants([first, second])


@every_hash
def test_a_reused_block_is_no_hit_for_what_it_held(hash_function: Callable[..., int]) -> None:
    """D09."""
    manager = BlockManager(2, 2, hash_function)
    manager.deallocate(computed(manager, [1, 2, 3, 4]))
    computed(manager, [0, 3, 3, 4])
    assert hits(manager, [1, 2, 3, 4]) == []
    assert len(hits(manager, [0, 3, 3, 4])) == 2
    assert manager.num_evictions == 2


@given(data=st.data(), hash_function=st.sampled_from([block_hash, weak_hash, no_hash]))
def test_hits_are_the_longest_stored_prefix_whatever_the_hash(
    data: st.DataObject, hash_function: Callable[..., int]
) -> None:
    """D09: against the definition, over every text that is alive or was freed and not evicted."""
    prompts = st.lists(st.integers(0, 2), min_size=1, max_size=7)
    texts = data.draw(st.lists(prompts, min_size=1, max_size=6))
    manager = BlockManager(24, 2, hash_function)  # room for all: nothing is evicted
    sequences = [computed(manager, text) for text in texts]
    for seq in data.draw(st.permutations(sequences))[:3]:
        manager.deallocate(seq)
    probe = data.draw(prompts)
    prefixes = {tuple(text[:end]) for text in texts for end in range(2, len(text) + 1, 2)}
    expected = next((end for end in range(len(probe) // 2 * 2, 0, -2) if tuple(probe[:end]) in prefixes), 0)
    assert len(hits(manager, probe)) * 2 == expected


@every_hash
def test_when_the_mapped_twin_is_evicted_the_other_is_still_hit(hash_function: Callable[..., int]) -> None:
    """D13: two equal prompts computed in one step."""
    manager = BlockManager(4, 2, hash_function)
    first, second = allocated(manager, [1, 2, 3, 4]), allocated(manager, [1, 2, 3, 4])
    compute(manager, first)
    compute(manager, second)
    manager.deallocate(first)
    other = allocated(manager, [7, 8, 9])  # takes both blocks of the first
    assert hits(manager, [1, 2, 3, 4]) == second.block_table
    manager.check_invariants([second, other])
    manager.deallocate(second)
    assert len(hits(manager, [1, 2, 3, 4])) == 2


def test_an_owned_twin_is_hit_before_a_free_one() -> None:
    """D13: it costs no free block."""
    manager = BlockManager(2, 2)
    first, second = allocated(manager, [1, 2]), allocated(manager, [1, 2])
    compute(manager, first)
    compute(manager, second)
    manager.deallocate(first)
    assert hits(manager, [1, 2, 9]) == second.block_table
    assert manager.can_allocate(make_sequence([1, 2, 9], 2))


# --- free blocks and their reuse ---


def test_freed_blocks_stay_hittable() -> None:
    manager = BlockManager(4, 2)
    seq = computed(manager, [1, 2, 3, 4])
    table = list(seq.block_table)
    manager.deallocate(seq)
    assert (seq.block_table, seq.num_cached_tokens, seq.num_tokens_with_kv) == ([], 0, 0)
    assert manager.num_free_blocks == 4
    assert allocated(manager, [1, 2, 3, 4, 5]).block_table[:2] == table


def test_blocks_are_reused_uncached_first_then_longest_unused_and_tails_before_heads() -> None:
    manager = BlockManager(6, 2)
    long, short = computed(manager, [1, 2, 3, 4, 5]), computed(manager, [6, 7])
    assert (long.block_table, short.block_table) == ([0, 1, 2], [3])
    manager.deallocate(short)
    manager.deallocate(long)
    taken = [allocated(manager, [90 + count]).block_table[0] for count in range(6)]
    assert set(taken[:3]) == {2, 4, 5}, "hold nothing that could be hit"
    assert taken[3:] == [3, 1, 0]
    assert manager.num_evictions == 3


def test_a_hit_makes_a_block_recently_used() -> None:
    manager = BlockManager(2, 2)
    manager.deallocate(computed(manager, [1, 2]))
    manager.deallocate(computed(manager, [3, 4]))
    manager.deallocate(compute(manager, allocated(manager, [1, 2])))
    allocated(manager, [9])
    assert len(hits(manager, [1, 2])) == 1
    assert hits(manager, [3, 4]) == []


def test_a_free_hit_still_takes_its_block_from_the_free_ones() -> None:
    manager = BlockManager(3, 2)
    manager.deallocate(computed(manager, [1, 2, 3, 4]))
    assert not manager.can_allocate(make_sequence([1, 2, 3, 4, 5, 6, 7], 2))
    assert manager.can_allocate(make_sequence([1, 2, 3, 4, 5], 2))
    assert not manager.can_allocate(make_sequence([1, 2, 3, 4, 5], 2), num_reserved_blocks=1)


def test_taking_a_block_out_of_the_free_list_walks_over_no_other() -> None:
    """D20: hits in the middle of 20,000 free blocks, in a free list and a pool that refuse to be walked."""

    class NeverWalked(OrderedDict):
        def __iter__(self):
            raise AssertionError("the free list was walked")

        keys = items = values = __reversed__ = __iter__

    class Pool(list):
        def __iter__(self):
            raise AssertionError("the pool was walked")

        __reversed__ = __contains__ = index = remove = __iter__

    manager = BlockManager(20_000, 2)
    seqs = [computed(manager, [7, count, 1]) for count in range(50)]
    for seq in seqs:
        manager.deallocate(seq)
    manager._free_block_ids = NeverWalked(manager._free_block_ids)
    manager.blocks = Pool(manager.blocks)
    again = [allocated(manager, [7, count, 1]) for count in range(50)]
    assert all(seq.num_cached_tokens == 2 for seq in again)
    for seq in again:
        manager.deallocate(seq)
    assert manager.num_free_blocks == 20_000


def test_an_empty_pool_is_a_named_error() -> None:
    manager = BlockManager(1, 2)
    allocated(manager, [1])
    with pytest.raises(RuntimeError, match=r"^no free KV block: call can_allocate or can_append first$"):
        allocated(manager, [2])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_blocks_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {num_blocks} and {block_size}"):
        BlockManager(num_blocks, block_size)


# --- growth ---


@pytest.mark.parametrize("block_size", [1, 2, 256])
def test_a_block_is_opened_when_its_first_token_has_been_appended(block_size: int) -> None:
    """D02, D08: at len % block_size == 1 after appending (every token for block_size 1), and once."""
    manager = BlockManager(600, block_size)
    seq = allocated(manager, [0])
    opened = []
    for length in range(2, 2 * block_size + 4):
        seq.append_token(0)
        before = manager.num_free_blocks
        manager.append(seq)
        manager.append(seq)
        opened += [length] * (before - manager.num_free_blocks)
    assert opened == [length for length in range(2, 2 * block_size + 4) if length % block_size == 1 % block_size]


@pytest.mark.parametrize("block_size", [1, 2, 4, 256])
def test_an_exactly_full_pool_appends_until_the_next_block_opens(block_size: int) -> None:
    """D02."""
    manager = BlockManager(2, block_size)
    seq = allocated(manager, [0] * (block_size + 1))
    while len(seq) < 2 * block_size:
        seq.append_token(0)
        assert manager.can_append(seq)
        manager.append(seq)
    seq.append_token(0)
    assert not manager.can_append(seq)
