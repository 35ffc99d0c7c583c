"""The checks of what a scheduler decides in one step and does after it, in the order of cause and effect."""

from collections import Counter
from typing import Any

from tests.conformance.components.adapters.names import RUNNING, WAITING
from tests.conformance.components.adapters.steps import Scheduled
from tests.conformance.components.request import Request
from tests.conformance.components.sizes import EOS

NO_FREE_LIST = "the block manager has no list of free blocks that a table of adapters/ has"


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


def note_admissions(target: Any, before: Before, batch: list[Scheduled]) -> None:
    admitted = target.admitted = []
    for request in target.live:
        if not request.table:
            request.was_preempted |= request.is_admitted
            request.was_caught |= request.is_admitted and request.num_in_flight > 0
            request.is_admitted = False
    for item in batch:
        request = target.request_of(item.seq)
        if not request.is_admitted:
            request.is_admitted = True
            request.num_hit_tokens = item.start
            admitted.append(request)
    size = target.setup.block_size
    kept = {block_id for r in target.live for block_id in r.table if block_id in before.tables.get(r.number, ())}
    kept = kept.union(*(r.table[: -(-r.num_hit_tokens // size)] for r in admitted))
    for block_id in {block_id for item in batch for block_id in item.seq.block_table} - kept:
        target.cache.forget(block_id)


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


def check_tokens(target: Any, requests: list[Request]) -> None:
    for request in requests:
        name, seq, known = f"request {request.number}", request.seq, request.known
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


def check_left(target: Any, request: Request, contract: str) -> None:
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
