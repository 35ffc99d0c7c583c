"""BlockManager: allocates blocks, and shares those of equal prefixes."""

from collections import deque

import numpy as np
import xxhash
from smallvllm.engine.sequence import Sequence


class Block:
    def __init__(self, block_id: int):
        self.block_id = block_id
        self.ref_count = 0
        self.hash = -1
        self.token_ids: list[int] = []
        self.prefix: list[int] = []  # every token up to the end of the block


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.hash_to_block_id: dict[int, int] = {}
        self.free_block_ids = deque(range(num_blocks))

    @staticmethod
    def compute_hash(token_ids: list[int], parent: int = -1) -> int:
        state = xxhash.xxh64(np.array([parent + 1, len(token_ids)], dtype=np.uint64).tobytes())
        state.update(np.array(token_ids, dtype=np.int64).tobytes())
        return state.intdigest() >> 1

    def _take_free_block(self) -> int:
        block_id = self.free_block_ids.popleft()
        block = self.blocks[block_id]
        if self.hash_to_block_id.get(block.hash) == block_id:
            del self.hash_to_block_id[block.hash]
        block.hash, block.token_ids, block.prefix = -1, [], []
        block.ref_count = 1
        return block_id

    def find_cached(self, seq: Sequence) -> list[int]:
        """Cached blocks with the beginning of the sequence; its last token is always computed."""
        found, parent = [], -1
        for index in range((len(seq) - 1) // self.block_size):
            parent = self.compute_hash(seq.block(index), parent)
            block_id = self.hash_to_block_id.get(parent)
            if block_id is None or self.blocks[block_id].prefix != seq.prefix(index + 1):
                break
            found.append(block_id)
        return found

    def can_allocate(self, seq: Sequence) -> bool:
        shared = [block_id for block_id in self.find_cached(seq) if self.blocks[block_id].ref_count]
        return len(self.free_block_ids) >= seq.num_blocks - len(shared)

    def allocate(self, seq: Sequence):
        for block_id in self.find_cached(seq):
            block = self.blocks[block_id]
            if block.ref_count == 0:
                self.free_block_ids.remove(block_id)
            block.ref_count += 1
            seq.block_table.append(block_id)
        seq.num_cached_tokens = len(seq.block_table) * self.block_size
        while len(seq.block_table) < seq.num_blocks:
            seq.block_table.append(self._take_free_block())

    def deallocate(self, seq: Sequence):
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_block_ids.append(block_id)
        seq.block_table = []
        seq.num_cached_tokens = 0

    def can_append(self, seq: Sequence) -> bool:
        return len(self.free_block_ids) >= seq.num_blocks - len(seq.block_table)

    def may_append(self, seq: Sequence):
        if seq.num_tokens_ahead % self.block_size == 1:
            seq.block_table.append(self._take_free_block())

    def hash_blocks(self, seq: Sequence, num_computed: int):
        """Enter the blocks that the computed tokens fill."""
        first = seq.num_cached_tokens // self.block_size
        parent = self.blocks[seq.block_table[first - 1]].hash if first else -1
        for index in range(first, (seq.num_cached_tokens + num_computed) // self.block_size):
            block = self.blocks[seq.block_table[index]]
            parent = self.compute_hash(seq.block(index), parent)
            block.hash, block.token_ids, block.prefix = parent, seq.block(index), seq.prefix(index + 1)
            self.hash_to_block_id[parent] = block.block_id
