"""BlockManager in lock-step with reference.block_manager: what is shared, what fits and what will be forgotten first.

The two number their blocks differently; what is compared is behaviour, and so there must be a one-to-one map between
their blocks. Both hashes: the engine's, and one of two bits, with which collisions happen all the time.
"""

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm.engine.block_manager import BlockHash, BlockManager, block_hash
from nanovllm.engine.sequence import Sequence
from reference.block_manager import BlockManager as Reference
from tests.support.counts import count_comparisons, count_event
from tests.support.engine_events import assert_occurred
from tests.support.scheduling import PROMPTS, Collisions, make_sequence, two_bit_hash


class LockStep(RuleBasedStateMachine):
    """Sequences are allocated, computed piece by piece, grow, and are freed; pools are small enough to run out."""

    hash_function: BlockHash = staticmethod(block_hash)
    seen: ClassVar[Counter[str]] = Counter()  # what occurred, over all runs

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.engine = BlockManager(num_blocks, block_size, self.hash_function)
        self.reference = Reference(num_blocks, block_size)
        self.collisions = Collisions(self.engine)
        self.sequences: list[Sequence] = []  # those that own blocks
        self.texts: list[list[int]] = [[0]]  # of all sequences there were
        self.content: dict[int, tuple[int, ...]] = {}  # cached block of the engine -> all tokens to its end
        self.num_arrivals = 0

    # --- what happens ---

    @rule(token_ids=PROMPTS, num_reserved=st.integers(0, 2))
    def allocate(self, token_ids: list[int], num_reserved: int = 0) -> None:
        seq = make_sequence(token_ids, self.engine.block_size, seq_id=self.num_arrivals)
        self.num_arrivals += 1
        assert len(self.engine.find_cached_blocks(seq)) == len(self.reference.hits(token_ids)), "D09, D13"
        can_allocate = self.engine.can_allocate(seq, num_reserved)
        assert can_allocate == self.reference.can_allocate(token_ids, num_reserved), "D10"
        count_comparisons("BlockManager against reference", 2)
        if not can_allocate:
            self.count("allocation refused")
            return
        self.engine.allocate(seq)
        self.reference, num_cached_tokens = self.reference.allocate(seq.seq_id, token_ids)
        assert seq.num_cached_tokens == seq.num_cached_prompt_tokens == num_cached_tokens, "D05, D14"
        self.sequences.append(seq)
        self.texts.append(seq.token_ids)

    @rule(number=st.integers(0, 99), num_more=st.integers(0, 3))
    def allocate_again(self, number: int, num_more: int) -> None:
        """A text that was there before, prompt and output, and perhaps what goes on from it."""
        self.allocate([*self.texts[number % len(self.texts)][:24], *[1] * num_more])

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=5), num_copies=st.integers(2, 4))
    def allocate_and_compute_copies(self, token_ids: list[int], num_copies: int) -> None:
        """Equal prompts of one step: twins."""
        first = len(self.sequences)
        for _ in range(num_copies):
            self.allocate(token_ids)
        for number in range(first, len(self.sequences)):
            self.compute(number, len(token_ids))

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 99), num_tokens=st.integers(1, 9))
    def compute(self, number: int, num_tokens: int) -> None:
        """A step stores the keys of some of its tokens: what Scheduler.postprocess does of it."""
        seq = self.sequences[number % len(self.sequences)]
        seq.num_cached_tokens = min(seq.num_cached_tokens + num_tokens, len(seq))
        seq.num_tokens_with_kv = max(seq.num_tokens_with_kv, seq.num_cached_tokens)
        self.engine.cache_full_blocks(seq)
        for index, block_id in enumerate(seq.block_table[: seq.num_tokens_with_kv // seq.block_size]):
            self.content[block_id] = tuple(seq.token_ids[: (index + 1) * seq.block_size])
        self.reference = self.reference.computed(seq.seq_id, seq.token_ids, seq.num_cached_tokens)

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 99), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def grow(self, number: int, token_ids: list[int]) -> None:
        """Computed whole, then one token after the other; without a block for it, it loses all, as in preemption."""
        seq = self.sequences[number % len(self.sequences)]
        self.compute(number, len(seq))
        for token_id in token_ids:
            seq.append_token(token_id)
            can_append = self.engine.can_append(seq)
            assert can_append == self.reference.can_append(seq.seq_id, len(seq)), "D02"
            count_comparisons("BlockManager against reference")
            if not can_append:
                self.count("append refused")
                self.free(number)
                return
            self.engine.append(seq)
            self.reference = self.reference.append(seq.seq_id, len(seq))
            self.compute(number, 1)

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0, 99))
    def free(self, number: int) -> None:
        seq = self.sequences.pop(number % len(self.sequences))
        self.engine.deallocate(seq)
        self.reference = self.reference.deallocate(seq.seq_id)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.count("hash collision", self.collisions.number)
            self.count("block hit", self.engine.num_hit_blocks)
            self.count("block evicted", self.engine.num_evictions)

    def count(self, event: str, number: int = 1) -> None:
        self.seen[event] += number
        count_event(event, number)

    # --- what must hold ---

    @invariant()
    def both_own_share_and_remember_the_same(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_invariants(self.sequences)
        self.collisions.count()
        theirs: dict[int, int] = {}  # block of the engine -> block of the reference
        for seq in self.sequences:
            table = self.reference.tables[seq.seq_id]
            for ours, other in zip(seq.block_table, table, strict=True):
                assert theirs.setdefault(ours, other) == other, "D13: the two share different blocks"
                assert self.engine.blocks[ours].is_cached == (other in self.reference.prefixes)
        assert len(set(theirs.values())) == len(theirs), "the reference shares what the engine does not"
        assert self.engine.num_free_blocks == len(self.reference.free), "D02"
        will_forget = [self.content[block_id] for block_id in self.cached_free_blocks()]
        order = self.reference.reuse_order()
        assert will_forget == [self.reference.prefixes[block] for block in order if block in self.reference.prefixes]
        count_comparisons("BlockManager against reference", 2 * len(theirs) + len(will_forget) + 1)

    def cached_free_blocks(self) -> list[int]:
        """Next to be reused first; what is not cached must come before them."""
        is_cached = [self.engine.blocks[block_id].is_cached for block_id in self.engine._free_block_ids]
        assert is_cached == sorted(is_cached), "a cached block would be reused before one that holds nothing"
        return list(self.engine._free_block_ids)[is_cached.count(False) :]


class LockStepWithCollisions(LockStep):
    hash_function = staticmethod(two_bit_hash)


def everything_occurs(machine: LockStep) -> None:
    """Two equal prompts fill a pool of six blocks of two tokens; one is freed and comes again; then one grows."""
    machine.start(num_blocks=6, block_size=2)
    machine.allocate_and_compute_copies([0, 1, 0, 1, 1], num_copies=2)
    machine.free(1)
    machine.allocate_again(0, num_more=0)
    machine.allocate_again(1, num_more=0)
    machine.both_own_share_and_remember_the_same()
    machine.allocate([0] * 6)
    machine.grow(0, [0, 1, 0, 1, 0, 1, 0, 1])
    machine.free(0)
    for number in range(16):
        machine.allocate([number >> bit & 1 for bit in range(4)] * 2)
        machine.compute(0, 8)
        machine.both_own_share_and_remember_the_same()
        machine.free(0)
    machine.teardown()


@pytest.mark.parametrize("machine", [LockStep, LockStepWithCollisions])
def test_engine_and_reference_do_the_same(machine: type[LockStep]) -> None:
    """D02, D05, D09, D13, D14: hits, twins, what fits, what is reused in which order, whatever the hash."""
    machine.seen.clear()
    everything_occurs(machine())
    required = {"allocation refused", "append refused", "block hit", "block evicted"}
    assert_occurred(machine.seen, required | ({"hash collision"} if machine is LockStepWithCollisions else set()))
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=40))
