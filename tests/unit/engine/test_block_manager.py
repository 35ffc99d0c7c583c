"""BlockManager: sharing and allocation. test_scheduler_against_reference.py compares hits and reuse."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.engine.block_manager import BlockManager, block_hash
from reference import block_hash as reference
from tests.support.block_invariants import check_invariants
from tests.support.counts import count_comparisons
from tests.support.scheduling import allocated, compute, computed, make_sequence, two_bit_hash


def no_hash(tokens: list[int], parent: int | None) -> int:
    return 0


def hits(manager: BlockManager, token_ids: list[int]) -> list[int]:
    return manager.find_cached_blocks(make_sequence(token_ids, manager.block_size))


every_hash = pytest.mark.parametrize("hash_function", [block_hash, two_bit_hash, no_hash])


# --- the hash ---


@given(tokens=st.lists(st.integers(0, 2**31), min_size=1, max_size=40), parent=st.none() | st.integers(0, 2**64 - 1))
@example(tokens=[1, 2], parent=0)  # as any other hash of a parent
def test_block_hash_equals_the_references(tokens: list[int], parent: int | None) -> None:
    assert block_hash(tokens, parent) == reference.block_hash(tokens, parent)
    count_comparisons("BlockManager: hashes against the reference")


def test_each_block_is_hashed_once_with_the_hash_of_the_block_before_it() -> None:
    calls = []

    def counted(tokens: list[int], parent: int | None) -> int:
        calls.append((tokens, parent))
        return 100 + len(calls)

    manager = BlockManager(20, 2, counted)
    seq = make_sequence([1, 2, 3, 4, 5], 2)
    for _ in range(3):
        manager.can_allocate(seq, 0)
    manager.allocate(seq)
    for token in range(6, 12):
        compute(manager, seq)
        seq.append_token(token)
        manager.append(seq)
    manager.deallocate(seq)
    manager.allocate(seq)
    assert calls == [([1, 2], None), ([3, 4], 101), ([5, 6], 102), ([7, 8], 103), ([9, 10], 104)]


# --- sharing ---


@pytest.mark.parametrize("num_tokens", [2, 4, 8])
def test_a_prompt_cached_whole_leaves_one_token_to_compute_and_none_to_store(num_tokens: int) -> None:
    """D05, D14, D06: of a multiple of the block size, one token is computed, not a block."""
    manager, prompt = BlockManager(8, 2), list(range(num_tokens))
    first, second = computed(manager, prompt), allocated(manager, prompt)
    assert second.block_table == first.block_table
    assert (second.num_uncached_tokens, second.num_tokens_with_kv) == (1, num_tokens)
    third = allocated(manager, [*prompt, 9])
    assert third.block_table[:-1] == first.block_table
    assert (third.num_cached_tokens, third.num_tokens_with_kv, third.num_cached_prompt_tokens) == (num_tokens,) * 3
    assert manager.num_hit_blocks == num_tokens
    check_invariants(manager, [first, second, third])


@every_hash
def test_of_equal_prompts_in_one_step_each_is_found_without_the_other(hash_function: Callable[..., int]) -> None:
    """D13: while both copies are there, the owned one is shared, since it costs no free block."""
    manager = BlockManager(4, 2, hash_function)
    first, second = allocated(manager, [1, 2, 3, 4]), allocated(manager, [1, 2, 3, 4])
    for seq in (first, second):
        compute(manager, seq)
    check_invariants(manager, [first, second])
    manager.deallocate(first)
    assert hits(manager, [1, 2, 3, 4]) == second.block_table, "sharing owned blocks leaves the free ones free"
    other = allocated(manager, [9, 9, 9, 9])  # in the blocks of the first
    assert hits(manager, [1, 2, 3, 4]) == second.block_table
    assert manager.num_evictions == 2
    check_invariants(manager, [second, other])


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
    check_invariants(manager, [first, second])


@given(data=st.data(), hash_function=st.sampled_from([block_hash, two_bit_hash, no_hash]))
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


# --- free blocks and their reuse ---


def test_a_sequence_without_blocks_has_nothing_stored() -> None:
    manager = BlockManager(4, 2)
    seq = computed(manager, [1, 2, 3, 4])
    manager.deallocate(seq)
    assert (seq.block_table, seq.num_cached_tokens, seq.num_tokens_with_kv) == ([], 0, 0)
    assert (seq.num_uncached_tokens, manager.num_free_blocks) == (4, 4)


def test_taking_a_block_out_of_the_free_list_walks_over_no_other() -> None:
    """D20: a hit in the middle of the free blocks, in a free list and a pool that refuse to be walked."""

    def refuse(*_: object) -> Any:
        raise AssertionError("all blocks were walked over")

    walks = dict.fromkeys(("__iter__", "__reversed__", "__contains__", "keys", "items", "index", "remove"), refuse)
    manager = BlockManager(100, 2)
    for seq in [computed(manager, [7, count, 1]) for count in range(9)]:
        manager.deallocate(seq)
    manager._free_block_ids = type("FreeList", (OrderedDict,), walks)(manager._free_block_ids)
    manager.blocks = type("Pool", (list,), walks)(manager.blocks)
    again = allocated(manager, [7, 5, 1])
    assert again.num_cached_tokens == 2
    manager.deallocate(again)
    assert manager.num_free_blocks == 100


def test_an_empty_pool_is_a_named_error() -> None:
    manager = BlockManager(1, 2)
    allocated(manager, [1])
    with pytest.raises(RuntimeError, match=r"^no free KV block: call can_allocate or can_append first$"):
        allocated(manager, [2])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_blocks_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {num_blocks} and {block_size}"):
        BlockManager(num_blocks, block_size)


# --- check_invariants ---

# What the message says -> what breaks it: a change of a BlockManager, or of its cached block 0 or 1.
BREAKS: dict[str, Callable[[BlockManager, Any, Any], object]] = {
    "free list .* is not the set of unowned blocks": lambda manager, block, other: manager._free_block_ids.popitem(),
    "block 0 has ref_count 5 and 1 owners": lambda manager, block, other: setattr(block, "ref_count", 5),
    "blocks found by hash .* are not the cached": lambda manager, block, other: manager.hash_to_block_ids.popitem(),
    "an empty list of blocks": lambda manager, block, other: manager.hash_to_block_ids.update({12345: []}),
    "cached block 0 is not found by its hash": lambda manager, block, other: setattr(block, "hash", 12345),
    "cached block 0 holds 1 tokens, not 2": lambda manager, block, other: block.token_ids.pop(),
    "content of another but not its prefix_id": lambda manager, block, other: setattr(other, "token_ids", [1, 2]),
    "names two contents": lambda manager, block, other: setattr(other, "prefix_id", block.prefix_id),
}


@pytest.mark.parametrize("words", [*BREAKS, "owns a block twice"])
def test_check_invariants_names_what_is_broken(words: str) -> None:
    manager = BlockManager(6, 2)
    sequences = [computed(manager, [1, 2]), computed(manager, [3, 4, 5])]
    check_invariants(manager, sequences)
    if words in BREAKS:
        BREAKS[words](manager, *manager.blocks[:2])
    else:
        sequences[1].block_table.append(1)
    with pytest.raises(RuntimeError, match=f"BlockManager invariant broken: .*{words}"):
        check_invariants(manager, sequences)
