"""The symbolic cache that stands for a model's, and the checks of what a step stores in it and reads.

A slot of the cache holds (chain, token, position): chain is a digest of all tokens up to the position, which is what
the key of a deeper layer depends on.
"""

from itertools import accumulate
from typing import Any

from tests.conformance.components.adapters.steps import Scheduled
from tests.conformance.components.sizes import EOS


def chains(tokens: list[int]) -> list[int]:
    """Digest of each prefix, in every process the same."""
    return list(accumulate(tokens, lambda value, token: hash((value, token)), initial=0))[1:]


class SymbolicCache:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[Any] = [None] * (num_blocks * block_size)
        self.places: dict[int, list[Any]] = {}  # of blocks on the CPU

    def move(self, is_out: bool, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks to places on the CPU, (block, place); or back, (place, block) or (block, place)."""
        size = self.block_size
        for pair in pairs:
            is_place_first = not is_out and pair[0] in self.places
            place, block_id = pair if is_place_first else pair[::-1]
            block = slice(block_id * size, (block_id + 1) * size)
            if is_out:
                self.places[place] = self.slots[block]
            else:
                self.slots[block] = self.places.pop(place, [None] * size)

    def forget(self, block_id: int) -> None:
        """The block was taken for new tokens: what it held may not be read any more."""
        first = block_id * self.block_size
        self.slots[first : first + self.block_size] = [None] * self.block_size

    def slot(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size


def next_token(tokens: list[int]) -> int:
    """0 or 1, and now and then the end of the sequence: what a model would sample after these tokens."""
    value = chains(tokens)[-1]
    return EOS if value % 7 == 0 else value // 7 % 2


def store_and_read(target: Any, batch: list[Scheduled]) -> None:
    """As in a model: every key of the step is stored first, then each query reads all keys before it."""
    cache = target.cache
    readers = [(request, request.table) for request in target.live]
    values = {id(item.seq): _values(target.request_of(item.seq).tokens) for item in batch}
    written: dict[int, Any] = {}
    for item in batch:
        for position in range(item.first_stored, item.end):
            slot = cache.slot(item.seq.block_table, position)
            value = values[id(item.seq)][position]
            target.check("C01")
            if written.setdefault(slot, value) != value:
                target.broken("C01", f"two sequences of one step store their keys in slot {slot}")
            if cache.slots[slot] not in (None, value):
                _check_no_reader(target, item, slot, readers)
    cache.slots = [written.get(slot, value) for slot, value in enumerate(cache.slots)]
    for item in batch:
        _check_reads(target, item, values[id(item.seq)])


def _values(tokens: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(chains(tokens), tokens, range(len(tokens)), strict=True))


def _check_no_reader(target: Any, item: Scheduled, slot: int, readers: list[Any]) -> None:
    """The slot's content changes: no other sequence may need what is there now."""
    block, offset = divmod(slot, target.setup.block_size)
    for request, table in readers:
        if request.seq is item.seq or block not in table:
            continue
        index = table.index(block) * target.setup.block_size + offset
        if index < len(request.tokens) - 1 and target.cache.slots[slot] == _values(request.tokens)[index]:
            if request in target.admitted and index < request.num_hit_tokens:
                writer = target.request_of(item.seq).number
                what = f"request {request.number} shares block {block}, which request {writer} fills in the same step"
                target.broken(target.hit_contract, what)
            target.broken("C01", f"slot {slot} is overwritten, and request {request.number} reads it")


def _check_reads(target: Any, item: Scheduled, right: list[tuple[int, int, int]]) -> None:
    cache, request = target.cache, target.request_of(item.seq)
    for position in range(item.end):
        found = cache.slots[cache.slot(item.seq.block_table, position)]
        is_hit = position < request.num_hit_tokens
        for contract in (target.hit_contract, "C08") if is_hit else ():
            target.check(contract)
        if found == right[position]:
            continue
        name, block = f"request {request.number}", item.seq.block_table[position // target.setup.block_size]
        if not is_hit:
            target.broken("C01", f"{name} reads token {position} in block {block}, which was overwritten")
        if found is None:
            return target.broken("C08", f"block {block} is shared, and token {position} was never stored in it")
        is_same = found[1] == right[position][1]
        what = "the right token, after other tokens than its own" if is_same else "another token"
        target.broken(target.hit_contract, f"{name} shares block {block}, which holds for token {position} {what}")
