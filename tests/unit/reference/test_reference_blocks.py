"""block_hash against the xxhash package; block_manager against a simulated memory and against its stated policy."""

import struct

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from reference.block_hash import block_hash, xxh64
from reference.block_manager import BlockManager
from tests.support.counts import count_comparisons


@given(data=st.binary(max_size=200), seed=st.integers(0, 2**64 - 1))
def test_xxh64_equals_the_package(data: bytes, seed: int) -> None:
    assert xxh64(data, seed) == xxhash.xxh64_intdigest(data, seed)
    count_comparisons("reference: xxh64 against the package")


@given(
    token_ids=st.lists(st.integers(0, 2**31), min_size=1, max_size=40),
    parent=st.none() | st.integers(0, 2**64 - 1),
)
def test_block_hash_is_xxh64_of_parent_and_tokens(token_ids: list[int], parent: int | None) -> None:
    digest = xxhash.xxh64(b"" if parent is None else struct.pack("<Q", parent))
    for token in token_ids:
        digest.update(struct.pack("<q", token))
    assert block_hash(token_ids, parent) == digest.intdigest()


def test_no_parent_differs_from_a_parent_of_zero() -> None:
    assert block_hash([1, 2]) != block_hash([1, 2], parent=0)


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, compute, grow and go. Beside the manager stands what a real cache would hold: for each slot, the
    text up to and including the token whose key was stored there last. Tokens are 0 and 1, so prefixes recur."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockManager(num_blocks=7, block_size=2)
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.num_computed: dict[int, int] = {}
        self.next_id = 0

    def is_stored(self, seq_id: int, num_tokens: int) -> bool:
        table, tokens = self.pool.tables[seq_id], self.tokens[seq_id]
        places = [(table[position // 2], position % 2) for position in range(num_tokens)]
        return all(self.slots.get(place) == tuple(tokens[: p + 1]) for p, place in enumerate(places))

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def allocate(self, token_ids: list[int]) -> None:
        if not self.pool.can_allocate(token_ids):
            return
        before = self.pool
        num_hits = len(before.hits(token_ids))
        self.pool, num_cached = before.allocate(self.next_id, token_ids)
        self.tokens[self.next_id], self.num_computed[self.next_id] = list(token_ids), num_cached
        assert num_cached < len(token_ids), "D05: one token is left to compute"
        assert len(self.pool.tables[self.next_id]) == -(-len(token_ids) // 2)
        assert self.is_stored(self.next_id, min(num_hits * 2, len(token_ids))), "D09: a hit is an equal whole prefix"
        self.next_id += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.tokens)))
        tokens, start, table = self.tokens[seq_id], self.num_computed[seq_id], self.pool.tables[seq_id]
        if start == len(tokens):
            return
        end = data.draw(st.integers(start + 1, len(tokens)))
        for position in range(start, end):
            block, offset = table[position // 2], position % 2
            if self.pool.ref_count(block) == 1 and block not in self.pool.prefixes:
                self.slots[block, offset] = tuple(tokens[: position + 1])
        self.pool = self.pool.computed(seq_id, tokens, end)
        self.num_computed[seq_id] = end

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.tokens)))
        length = len(self.tokens[seq_id]) + 1
        if self.num_computed[seq_id] != length - 1 or not self.pool.can_append(seq_id, length):
            return
        opens = length % 2 == 1
        free_before = len(self.pool.free)
        self.tokens[seq_id].append(token)
        self.pool = self.pool.append(seq_id, length)
        assert free_before - len(self.pool.free) == opens, "D02: a block exactly when the token opens one"

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def deallocate(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.tokens)))
        hits_before = self.pool.hits(self.tokens[seq_id])
        self.pool = self.pool.deallocate(seq_id)
        assert len(self.pool.hits(self.tokens[seq_id])) == len(hits_before), "freed blocks stay hittable"
        del self.tokens[seq_id], self.num_computed[seq_id]

    @invariant()
    def no_sequence_loses_what_it_computed(self) -> None:
        assert all(self.is_stored(seq_id, n) for seq_id, n in self.num_computed.items())
        count_comparisons("reference: block tables against what was stored", len(self.num_computed))

    @invariant()
    def only_full_known_prefixes_are_shared(self) -> None:
        owned = [block for table in self.pool.tables.values() for block in table]
        assert {block for block in owned if owned.count(block) > 1} <= set(self.pool.prefixes)
        assert all(len(set(table)) == len(table) for table in self.pool.tables.values())

    @invariant()
    def every_block_is_owned_or_free(self) -> None:
        owned = {block for table in self.pool.tables.values() for block in table}
        assert self.pool.free | owned == set(range(7))
        assert not self.pool.free & owned
        assert set(self.pool.freed) <= self.pool.free


CacheMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestCacheMachine = CacheMachine.TestCase


def filled(pool: BlockManager, seq_id: str, token_ids: list[int]) -> BlockManager:
    return pool.allocate(seq_id, token_ids)[0].computed(seq_id, token_ids, len(token_ids))


def test_what_holds_nothing_hittable_is_reused_first_then_the_least_recently_freed_and_tails_before_heads() -> None:
    pool = filled(filled(BlockManager(6, 2), "a", [1, 2, 3, 4, 5]), "b", [6, 7])
    assert pool.tables == {"a": (0, 1, 2), "b": (3,)}
    pool = pool.deallocate("b").deallocate("a")
    assert pool.reuse_order() == [4, 5, 2, 3, 1, 0]


def test_a_hit_that_is_free_costs_a_block_and_one_that_is_owned_does_not() -> None:
    owned = filled(BlockManager(3, 2), "a", [1, 2, 3])
    assert owned.can_allocate([1, 2, 9])
    assert not owned.can_allocate([1, 2, 9], reserve=1)
    pool = filled(BlockManager(3, 2), "a", [1, 2, 3, 4]).deallocate("a")
    assert not pool.can_allocate([1, 2, 9, 9, 9, 9, 9]), "4 blocks, 1 of them a free hit: it still has to fit"
    pool, num_cached = pool.allocate("b", [1, 2, 9, 9, 9])
    assert num_cached == 2
    assert pool.tables["b"][0] == 0
    assert pool.free == set()


def test_a_prompt_that_was_cached_whole_shares_all_blocks_and_leaves_one_token() -> None:
    """D05, D14."""
    prompt = [0, 1, 2, 3]
    pool, num_cached = filled(BlockManager(4, 2), "a", prompt).allocate("b", prompt)
    assert num_cached == 3
    assert pool.tables["b"] == pool.tables["a"]


@pytest.mark.parametrize(("leaves", "stays"), ["ab", "ba"])
def test_a_twin_survives_the_reuse_of_its_copy(leaves: str, stays: str) -> None:
    """D13: two equal prompts computed in one step hold the prefix twice; when one copy goes, the other is still hit.
    While both are there, the owned one is preferred, as it costs no free block."""
    pool = BlockManager(2, 2).allocate("a", [1, 2])[0].allocate("b", [1, 2])[0]
    pool = pool.computed("a", [1, 2], 2).computed("b", [1, 2], 2).deallocate(leaves)
    assert pool.hits([1, 2]) == pool.tables[stays]
    pool, _ = pool.allocate("c", [7])
    assert pool.hits([1, 2]) == pool.tables[stays]


def test_a_pool_that_is_exactly_full_appends_until_the_next_block_opens() -> None:
    """D02."""
    pool = filled(BlockManager(1, 4), "a", [1, 2])
    assert pool.can_append("a", 3)
    assert pool.can_append("a", 4)
    assert not pool.can_append("a", 5)
