"""The checks of one step, in the order of cause and effect, and the symbolic cache that stands for a model's.

A slot of the cache holds (chain, token, position): chain is a digest of all tokens up to the position, which is what
the key of a deeper layer depends on.
"""

from collections import Counter
from itertools import accumulate
from typing import Any

from tests.conformance.components.adapters import EOS, RUNNING, WAITING, Scheduled

NO_FREE_LIST = "the block manager has no list of free blocks that adapters.py knows"


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
    return 2 if value % 7 == 0 else value // 7 % 2


class Before:
    """The queues before a step."""

    def __init__(self, target: Any) -> None:
        self.running = {id(seq) for seq in target.adapter.queue(RUNNING)}
        self.tables = {request.number: request.table for request in target.live}
        self.free = target.adapter.free_blocks()
        self.num_lost = num_lost_blocks(target)
        size = target.setup.block_size
        going = [r for r in target.live if len(r.output) < r.max_tokens and id(r.seq) in self.running]
        self.demand = sum(max(0, -(-len(r.tokens) // size) - len(r.seq.block_table)) for r in going)
        self.preempted = [r for r in target.live if r.was_preempted and not r.is_admitted]


def check_schedule(target: Any, before: Before, batch: list[Scheduled]) -> None:
    """What schedule() decided: blocks first, then limits and order."""
    max_num_seqs, max_tokens = target.setup.max_num_seqs, target.setup.max_num_batched_tokens
    check_blocks(target)
    for item in batch:
        length = len(target.request_of(item.seq).tokens)
        what = f"a sequence of {length} tokens computes {item.count} from position {item.start} on"
        target.expect("C13", item.count >= 1 and item.end <= length, what)
        num_slots = len(item.seq.block_table) * target.setup.block_size
        what = f"the block table has {num_slots} slots, and the step computes up to token {item.end}"
        target.expect("C05", item.end <= num_slots, what)
    fits = len(batch) <= max_num_seqs
    target.expect("C11", fits, f"a step of {len(batch)} sequences, max_num_seqs={max_num_seqs}")
    num_tokens = sum(item.count for item in batch)
    what = f"a step of {num_tokens} tokens, max_num_batched_tokens={max_tokens}"
    target.expect("C10", num_tokens <= max_tokens or not fits, what)
    num_holding = sum(bool(request.table) for request in target.live)
    what = f"{num_holding} sequences hold blocks, max_num_seqs={max_num_seqs}"
    target.expect("C12", num_holding <= max_num_seqs or not fits, what)
    _check_preemptions(target, before, batch)


def check_blocks(target: Any) -> None:
    holders: Counter[int] = Counter()
    for request in target.holding:
        table = request.table
        target.check("C03")
        if len(set(table)) < len(table):
            hits = table[: request.num_hit_tokens // target.setup.block_size]
            is_hit = len(set(hits)) < len(hits)  # one block cannot hold two parts of a prefix
            target.broken(target.hit_contract if is_hit else "C03", f"the block table {table} has a block twice")
        holders.update(table)
    counts = target.adapter.ref_counts()
    if counts is None:
        target.skip("C02", "the blocks have no ref_count")
    else:
        target.check("C02")
        for block_id, count in enumerate(counts):
            if count != holders[block_id]:
                target.broken("C02", f"block {block_id}: ref_count {count}, in {holders[block_id]} block tables")
    free = target.adapter.free_blocks()
    if free is None:
        target.skip("C03", NO_FREE_LIST)
    elif set(free) & holders.keys() or len(set(free)) < len(free):
        both = sorted(set(free) & holders.keys())
        target.broken("C03", f"the free list {sorted(free)} has a block twice, or one of a block table: {both}")


def num_lost_blocks(target: Any) -> int:
    """Blocks that are neither free nor in a block table; 0 where the free blocks are not known."""
    held = {block_id for request in target.holding for block_id in request.table}
    free = target.adapter.free_blocks()
    return 0 if free is None else target.setup.num_blocks - len(held | set(free))


def explain_failure(target: Any, before: Before, num_lost: int) -> None:
    """schedule() failed or found nothing to compute: raises Broken if an earlier fault explains it."""
    check_blocks(target)
    _check_preemptions(target, before, [])
    if num_lost:
        target.broken("C04", f"no step: {num_lost} blocks are neither free nor in a block table")


def _check_preemptions(target: Any, before: Before, batch: list[Scheduled]) -> None:
    preempted = [r for r in target.live if not r.table and id(r.seq) in before.running]
    admitted = [target.request_of(item.seq) for item in batch if id(item.seq) not in before.running]
    if before.free is None:
        target.skip("C14", NO_FREE_LIST)
    elif preempted and not admitted:
        num_free = len(before.free)
        what = f"{num_free} blocks are free, the running sequences need {before.demand}, and one is preempted"
        target.expect("C14", num_free < before.demand, what)
    if not target.adapter.is_first_come_first_served:
        target.skip("C15", "the waiting queue is no deque: another order than first come, first served")
        return
    for request in admitted:
        for other in before.preempted:
            is_late = other is not request and not other.table and other.number < request.number
            what = f"request {request.number} runs, and request {other.number} waits since preempted"
            target.expect("C15", not is_late, what)


# --- the symbolic model ---


def store_and_read(target: Any, batch: list[Scheduled]) -> None:
    """As in a model: every key of the step is stored first, then each query reads all keys before it."""
    cache = target.cache
    readers = [(request, request.table) for request in target.live]
    values = {id(item.seq): _values(target.request_of(item.seq).tokens) for item in batch}
    written: dict[int, Any] = {}
    for item in batch:
        for position in range(target.adapter.first_stored(item), item.end):
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
            target.broken("C08", f"block {block} is shared, and token {position} was never stored in it")
        is_same = found[1] == right[position][1]
        what = "the right token, after other tokens than its own" if is_same else "another token"
        target.broken(target.hit_contract, f"{name} shares block {block}, which holds for token {position} {what}")


# --- after the step ---


def check_tokens(target: Any, batch: list[Scheduled]) -> None:
    for item in batch:
        request, seq = target.request_of(item.seq), item.seq
        name, known = f"request {request.number}", request.known
        contract = "C43" if request.was_caught else "C20"
        what = f"{name} has {len(seq)} tokens after this step, and must have {len(known)}"
        target.expect(contract, len(seq) == len(known), what)
        held = list(getattr(seq, "token_ids", known))
        if held != known:
            target.broken(contract, f"the tokens of {name} are {held}, and must be {known}")
        is_finished, why = target.adapter.is_finished(seq), request.must_end
        output = known[len(request.prompt) :]
        at_eos = bool(output) and output[-1] == EOS
        target.check("C21")
        if at_eos:
            target.check("C22")
        if is_finished and why is None:
            what = f"{name} ends after {len(output)} of {request.max_tokens} tokens"
            what += " at the end-of-sequence token, with ignore_eos" if at_eos else ""
            target.broken("C22" if at_eos else "C21", what)
        if why is not None and not is_finished:
            target.broken(why, f"{name} goes on after {len(output)} tokens {output}")
        if is_finished:
            request.is_finished = True
            if not target.is_ahead(request):
                check_left(target, request, "C23")
    check_blocks(target)


def check_left(target: Any, request: Any, contract: str) -> None:
    is_queued = any(request.seq is seq for names in (RUNNING, WAITING) for seq in target.adapter.queue(names))
    target.expect(contract, not is_queued, f"request {request.number} has ended and is still in a queue")
    held = {block_id for other in target.holding for block_id in other.table if other is not request}
    counts = target.adapter.ref_counts()
    if counts is not None and any(counts[block_id] and block_id not in held for block_id in request.table):
        target.broken(contract, f"request {request.number} has ended and still holds the blocks {request.table}")


def check_whole(target: Any) -> None:
    """C04, once every request has ended: all blocks are free, or a request that needs all of them is served."""
    check_blocks(target)
    target.check("C04")
    empty = target.adapter.empty_blocks()
    num_blocks = target.setup.num_blocks
    if empty is not None and len(set(empty)) == num_blocks:
        return
    why = ""
    request = target.add([5] * min(target.setup.num_slots, target.setup.longest - 1), max_tokens=1)
    try:
        for _ in range(len(request.prompt) + 4):
            if request.is_finished:
                return
            target.step()
    except AssertionError as error:
        why = f" ({getattr(error, 'message', error)})"
    if not request.is_finished:
        target.broken("C04", f"no request is left, and one that needs all {num_blocks} blocks is not served{why}")
