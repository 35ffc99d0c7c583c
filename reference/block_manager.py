"""Block manager: which sequence owns which block of the KV cache, and which blocks hold a known prefix to be shared.

    ref_count(block) = number of sequences whose table contains block
    free             = all blocks - the blocks in any table
    hits(tokens)     = the longest run of full blocks, from the start, whose whole prefix some block holds already
    cached tokens    = min(len(hits) * block_size, len(tokens) - 1)
    to be taken      = blocks for all tokens - hits that another sequence owns       <= len(free), or it does not fit

Why: equal prefixes have equal keys and values, so two sequences that begin alike can read the same blocks. A block that
its last sequence has freed can still be hit, until another sequence takes it. Only full blocks are shared and no
sequence writes to a full block, so sharing needs no copying. `prefixes` keeps the whole text up to the end of each
block, and a hit compares this text; the engine finds the block by block_hash and then compares. In both, a hit means
that the whole prefix is equal.
Why len - 1: the logits of the last token are wanted, so one token is always computed. When the whole sequence is
cached, all blocks are shared and the last token is computed without being stored again (slot -1).
Why the order of reuse: first come blocks that cannot be hit, then the longest unused; of one sequence the tail comes
before its head, since a tail without its head can never be hit.
Why twins: equal prompts that are computed in one step leave two blocks with the same prefix. A hit takes the oldest of
those that are owned, or else the oldest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class BlockManager:
    """A state of the pool; each operation returns the next state.

    >>> pool, cached = BlockManager(num_blocks=4, block_size=2).allocate("a", [1, 2, 3, 4, 5])
    >>> pool.tables, sorted(pool.free), cached
    ({'a': (0, 1, 2)}, [3], 0)
    >>> pool = pool.computed("a", [1, 2, 3, 4, 5], num_computed_tokens=5)
    >>> pool, cached = pool.allocate("b", [1, 2, 9])  # shares the block of 1 2
    >>> pool.tables["b"], pool.ref_count(0), cached
    ((0, 3), 2, 2)
    >>> pool = pool.deallocate("b").deallocate("a")
    >>> pool.reuse_order()  # 3 and 2 cannot be hit; then the tail of "a", then its head
    [3, 2, 1, 0]
    >>> pool.allocate("c", [1, 2, 3, 4])[1]  # a hit of everything, less one
    3
    """

    num_blocks: int
    block_size: int
    tables: Mapping[object, tuple[int, ...]] = field(default_factory=dict)  # sequence -> the blocks it owns, in order
    prefixes: Mapping[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # block that can be hit -> tokens to its end; oldest first
    freed: tuple[int, ...] = ()  # free blocks that were owned before, in the order in which they were freed

    def ref_count(self, block: int) -> int:
        return sum(block in table for table in self.tables.values())

    @property
    def free(self) -> set[int]:
        return set(range(self.num_blocks)).difference(*self.tables.values())

    def reuse_order(self) -> list[int]:
        age = {block: number for number, block in enumerate(self.freed)}
        return sorted(self.free, key=lambda block: (block in self.prefixes, age.get(block, -1), block))

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def hits(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        found: list[int] = []
        for end in range(self.block_size, len(token_ids) + 1, self.block_size):
            equal = [block for block, prefix in self.prefixes.items() if prefix == tuple(token_ids[:end])]
            if not equal:
                break
            found.append(min(equal, key=lambda block: block in self.free))  # of twins, an owned one: it costs nothing
        return tuple(found)

    def can_allocate(self, token_ids: Sequence[int], reserve: int = 0) -> bool:
        owned_hits = set(self.hits(token_ids)) - self.free
        return self.num_blocks_for(len(token_ids)) - len(owned_hits) + reserve <= len(self.free)

    def allocate(self, seq_id: object, token_ids: Sequence[int]) -> tuple["BlockManager", int]:
        """Give the sequence blocks for all its tokens. Return (next state, number of cached tokens)."""
        hits = self.hits(token_ids)
        available = [block for block in self.reuse_order() if block not in hits]
        taken = available[: self.num_blocks_for(len(token_ids)) - len(hits)]
        num_cached_tokens = min(len(hits) * self.block_size, len(token_ids) - 1)
        return self._own(seq_id, hits + tuple(taken), taken), num_cached_tokens

    def can_append(self, seq_id: object, num_tokens: int) -> bool:
        """Whether num_tokens fit, the new token included: a block is needed only when that token opens it."""
        return num_tokens <= len(self.tables[seq_id]) * self.block_size or len(self.free) > 0

    def append(self, seq_id: object, num_tokens: int) -> "BlockManager":
        opens = num_tokens > len(self.tables[seq_id]) * self.block_size
        taken = self.reuse_order()[:1] if opens else []
        return self._own(seq_id, self.tables[seq_id] + tuple(taken), taken)

    def computed(self, seq_id: object, token_ids: Sequence[int], num_computed_tokens: int) -> "BlockManager":
        """The keys and values of the first num_computed_tokens are in the cache: full blocks can be hit from now on."""
        ends = range(self.block_size, num_computed_tokens + 1, self.block_size)
        full = {block: tuple(token_ids[:end]) for block, end in zip(self.tables[seq_id], ends, strict=False)}
        return replace(self, prefixes={**self.prefixes, **full})

    def deallocate(self, seq_id: object) -> "BlockManager":
        last_owned = [block for block in reversed(self.tables[seq_id]) if self.ref_count(block) == 1]
        tables = {other: table for other, table in self.tables.items() if other != seq_id}
        return replace(self, tables=tables, freed=self.freed + tuple(last_owned))

    def _own(self, seq_id: object, table: tuple[int, ...], taken: list[int]) -> "BlockManager":
        """The sequence owns table. The taken blocks can no longer be hit."""
        prefixes = {block: prefix for block, prefix in self.prefixes.items() if block not in taken}
        freed = tuple(block for block in self.freed if block not in table)
        return replace(self, tables={**self.tables, seq_id: table}, prefixes=prefixes, freed=freed)


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
