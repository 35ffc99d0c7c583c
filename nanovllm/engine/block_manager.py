"""BlockManager: allocates KV blocks to sequences, and shares the blocks of equal prefixes (prefix cache).

A block is free if no sequence owns it. A full block whose keys and values have been computed is cached: a later
sequence that begins with the same tokens shares it. A freed block stays cached until it is reused; the last blocks of
a prefix are reused before its first ones.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import xxhash

from nanovllm.engine.sequence import Sequence

BlockHash = Callable[[list[int], int | None], int]


def block_hash(token_ids: list[int], parent: int | None) -> int:
    """XXH64 of the parent block's hash (8 bytes, little endian; nothing for a first block) and the tokens as int64."""
    state = xxhash.xxh64()
    if parent is not None:
        state.update(parent.to_bytes(8, "little"))
    state.update(np.array(token_ids, dtype="<i8").tobytes())
    return state.intdigest()


@dataclass(slots=True)
class Block:
    """One KV block.

    ref_count: number of sequences that own it. hash, token_ids: set while it is cached.
    prefix_id: identifies the tokens of a cached block and all tokens before them: equal ids mean equal prefixes. Hashes
        may collide, ids never do. parent_prefix_id is the id of the block before it, None for a first block.
    """

    block_id: int
    ref_count: int = 0
    hash: int | None = None
    token_ids: list[int] = field(default_factory=list)
    prefix_id: int | None = None
    parent_prefix_id: int | None = None

    @property
    def is_cached(self) -> bool:
        return self.prefix_id is not None


class BlockManager:
    """Manages num_blocks blocks of block_size tokens.

    hash_function: a weaker one makes look-ups slower, and never causes a wrong hit.
    num_hit_blocks, num_evictions: counted since construction.
    """

    def __init__(self, num_blocks: int, block_size: int, hash_function: BlockHash = block_hash) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}")
        self.block_size = block_size
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        # Several cached blocks have one hash if equal prompts were computed in the same step, and if hashes collide.
        self.hash_to_block_ids: dict[int, list[int]] = {}
        self.num_hit_blocks = 0
        self.num_evictions = 0
        self._hash = hash_function
        self._free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # in order of reuse
        self._prefix_ids = count(1)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_block_ids)

    # --- admission ---

    def find_cached_blocks(self, seq: Sequence) -> list[int]:
        """Ids of the cached blocks with the longest cached prefix of `seq`, in order."""
        self._hash_full_blocks(seq)
        found: list[int] = []
        parent: int | None = None
        for index, hash_value in enumerate(seq.block_hashes):
            block = self._find(hash_value, seq.block_token_ids(index), parent)
            if block is None:
                break
            found.append(block.block_id)
            parent = block.prefix_id
        return found

    def can_allocate(self, seq: Sequence, num_reserved_blocks: int) -> bool:
        """Whether there are blocks for all tokens of `seq`, with num_reserved_blocks left free."""
        shared = [block_id for block_id in self.find_cached_blocks(seq) if self.blocks[block_id].ref_count > 0]
        return self.num_free_blocks >= seq.num_blocks - len(shared) + num_reserved_blocks

    def allocate(self, seq: Sequence) -> None:
        """Allocate blocks for all tokens of `seq`, cached blocks first, and set its counters of cached tokens.

        At least one token is left to compute, because its logits are needed. Requires can_allocate(seq).
        """
        hits = self.find_cached_blocks(seq)
        for block_id in hits:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                del self._free_block_ids[block_id]
            block.ref_count += 1
        seq.block_table = hits + [self._pop_free_block() for _ in range(seq.num_blocks - len(hits))]
        seq.num_tokens_with_kv = len(hits) * self.block_size
        seq.num_cached_tokens = min(seq.num_tokens_with_kv, len(seq) - 1)
        if seq.num_cached_prompt_tokens is None:
            seq.num_cached_prompt_tokens = seq.num_cached_tokens
        self.num_hit_blocks += len(hits)

    def deallocate(self, seq: Sequence) -> None:
        """Free all blocks of `seq`. Cached blocks can be shared until they are reused."""
        for block_id in reversed(seq.block_table):  # the last block is freed first, to be reused first
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free_block_ids[block_id] = None
                if not block.is_cached:  # reuse it before any cached block
                    self._free_block_ids.move_to_end(block_id, last=False)
        seq.block_table = []
        seq.num_cached_tokens = 0
        seq.num_tokens_with_kv = 0

    # --- growth ---

    def can_append(self, seq: Sequence) -> bool:
        """Whether the last token has a block, or one can be allocated for it."""
        return self.num_free_blocks >= seq.num_blocks - len(seq.block_table)

    def append(self, seq: Sequence) -> None:
        """Allocate a block for the last token, if it needs a new one. Requires can_append(seq)."""
        while len(seq.block_table) < seq.num_blocks:
            self.append_block(seq)

    def append_block(self, seq: Sequence) -> None:
        """Allocate one more block to `seq`. Requires a free block."""
        seq.block_table.append(self._pop_free_block())

    # --- prefix cache ---

    def cache_full_blocks(self, seq: Sequence) -> None:
        """Enter the full blocks of `seq` into the prefix cache, if all of their keys and values are stored."""
        num_full = seq.num_tokens_with_kv // self.block_size
        first = num_full
        while first > 0 and not self.blocks[seq.block_table[first - 1]].is_cached:
            first -= 1
        if first == num_full:
            return
        self._hash_full_blocks(seq)
        parent = self.blocks[seq.block_table[first - 1]].prefix_id if first else None
        for index in range(first, num_full):
            block = self.blocks[seq.block_table[index]]
            self._cache(block, seq.block_hashes[index], seq.block_token_ids(index), parent)
            parent = block.prefix_id

    def clear_prefix_cache(self) -> None:
        """Remove all blocks from the prefix cache. Sequences keep their blocks."""
        for block in self.blocks:
            if block.is_cached:
                self._evict(block)

    def _hash_full_blocks(self, seq: Sequence) -> None:
        hashes = seq.block_hashes
        for index in range(len(hashes), len(seq) // self.block_size):
            hashes.append(self._hash(seq.block_token_ids(index), hashes[-1] if hashes else None))

    def _find(self, hash_value: int, token_ids: list[int], parent: int | None) -> Block | None:
        free: Block | None = None
        for block in (self.blocks[block_id] for block_id in self.hash_to_block_ids.get(hash_value, ())):
            if block.parent_prefix_id == parent and block.token_ids == token_ids:
                if block.ref_count > 0:  # sharing an owned block leaves the number of free blocks as it is
                    return block
                free = free or block
        return free

    def _cache(self, block: Block, hash_value: int, token_ids: list[int], parent: int | None) -> None:
        duplicate = self._find(hash_value, token_ids, parent)
        block.prefix_id = next(self._prefix_ids) if duplicate is None else duplicate.prefix_id
        block.parent_prefix_id = parent
        block.hash = hash_value
        block.token_ids = token_ids
        self.hash_to_block_ids.setdefault(hash_value, []).append(block.block_id)

    def _evict(self, block: Block) -> None:
        assert block.hash is not None
        same_hash = self.hash_to_block_ids[block.hash]
        same_hash.remove(block.block_id)
        if not same_hash:
            del self.hash_to_block_ids[block.hash]
        block.hash = block.prefix_id = block.parent_prefix_id = None
        block.token_ids = []
        self.num_evictions += 1

    def _pop_free_block(self) -> int:
        if not self._free_block_ids:
            raise RuntimeError("no free KV block: call can_allocate or can_append first")
        block_id, _ = self._free_block_ids.popitem(last=False)
        block = self.blocks[block_id]
        if block.is_cached:
            self._evict(block)
        block.ref_count = 1
        return block_id
