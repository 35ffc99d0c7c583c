"""Scheduler: which sequences compute how many tokens in the next step: prefill first, decode when nothing prefills.

    prefill  1. running sequences with more than one token left compute their next chunk, in order
             2. waiting sequences are admitted, first come first served, while there are seats (max_num_seqs), tokens
                (max_num_batched_tokens) and blocks: for all tokens of the sequence, and a reserve if others run
             a chunk is min(tokens left, budget left)
    decode   3. every running sequence with exactly one token left computes it; if the pool has no block for it, the
                last of running is preempted: it loses its blocks and goes back to the front of waiting

Why prefill first: a step reads all weights whether it computes one token or many, so the more sequences decode
together, the cheaper each token is. Why not always: steady arrivals would starve running sequences, so decoding is due
after MAX_CONSECUTIVE_PREFILLS prefill steps in a row.
Why nothing overtakes the first waiting sequence: if small requests could, a big one might never fit.
Why a reserve, one block for each sequence that will still grow: without it, the next decode step would preempt the
sequence that was just admitted. Why the last is preempted: it has waited least, and the first always finishes.
Why a single sequence never lacks a block: `fits` refuses a request that could outgrow the whole pool.
"""

from dataclasses import dataclass, replace

from reference.block_manager import BlockManager

MAX_CONSECUTIVE_PREFILLS = 8


@dataclass(frozen=True)
class Sequence:
    seq_id: int
    token_ids: tuple[int, ...]  # prompt and what was generated
    num_prompt_tokens: int
    max_tokens: int
    num_cached_tokens: int = 0  # whose keys and values are in the cache
    ending: frozenset[int] = frozenset()  # the tokens that end it: end of sequence, stop tokens

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_cached_tokens


@dataclass(frozen=True)
class Decision:
    is_prefill: bool
    scheduled: tuple[tuple[int, int], ...]  # (seq_id, number of tokens to compute); empty if there is nothing to do
    waiting: tuple[Sequence, ...]
    running: tuple[Sequence, ...]
    block_manager: BlockManager
    num_consecutive_prefills: int
    preempted: tuple[int, ...] = ()


def schedule(
    waiting: tuple[Sequence, ...],
    running: tuple[Sequence, ...],
    block_manager: BlockManager,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    num_consecutive_prefills: int = 0,
) -> Decision:
    """The decision is a function of the queues and the pool, and contains both as they are before the step is computed.

    With two prompts of 3 and 4 tokens and a budget of 5, the second computes 2 now and 2 in the next step.

    >>> pool = BlockManager(num_blocks=8, block_size=2)
    >>> line = Sequence(0, (1, 2, 3), 3, max_tokens=9), Sequence(1, (4, 5, 6, 7), 4, max_tokens=9)
    >>> limits = dict(max_num_seqs=4, max_num_batched_tokens=5, max_model_len=64)
    >>> step = schedule(line, (), pool, **limits)
    >>> step.is_prefill, step.scheduled, step.block_manager.tables
    (True, ((0, 3), (1, 2)), {0: (0, 1), 1: (2, 3)})
    """
    is_decode_due = num_consecutive_prefills >= MAX_CONSECUTIVE_PREFILLS and any(seq.num_left == 1 for seq in running)
    if not is_decode_due:
        limits = (max_num_seqs, max_num_batched_tokens, max_model_len)
        decision = prefill(waiting, running, block_manager, *limits, num_consecutive_prefills)
        if decision.scheduled:
            return decision
    return decode(waiting, running, block_manager)


def prefill(
    waiting: tuple[Sequence, ...],
    running: tuple[Sequence, ...],
    pool: BlockManager,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    num_consecutive_prefills: int,
) -> Decision:
    """Rules 1 and 2. `scheduled` is empty if nothing can prefill."""
    scheduled, budget = (), max_num_batched_tokens
    for seq in running:
        if seq.num_left > 1 and budget > 0:
            chunk = min(seq.num_left, budget)
            scheduled, budget = (*scheduled, (seq.seq_id, chunk)), budget - chunk
    while waiting and len(running) < max_num_seqs and budget > 0:
        head = waiting[0]
        reserve = num_that_can_grow((*running, head), pool, max_model_len) if running else 0
        if not pool.can_allocate(head.token_ids, reserve):
            break
        pool, num_cached_tokens = pool.allocate(head.seq_id, head.token_ids)
        head = replace(head, num_cached_tokens=num_cached_tokens)
        chunk = min(head.num_left, budget)
        scheduled, budget = (*scheduled, (head.seq_id, chunk)), budget - chunk
        waiting, running = waiting[1:], (*running, head)
    return Decision(True, scheduled, waiting, running, pool, num_consecutive_prefills + 1)


def most_blocks(seq: Sequence, pool: BlockManager, max_model_len: int) -> int:
    """How many blocks seq owns at its greatest length. The token sampled last is never stored."""
    return pool.num_blocks_for(min(seq.num_prompt_tokens + seq.max_tokens, max_model_len) - 1)


def fits(seq: Sequence, pool: BlockManager, max_model_len: int) -> bool:
    """Whether the request can be accepted: it has room for one more token, and could finish with the pool to itself."""
    return seq.num_prompt_tokens < max_model_len and most_blocks(seq, pool, max_model_len) <= pool.num_blocks


def num_that_can_grow(sequences: tuple[Sequence, ...], pool: BlockManager, max_model_len: int) -> int:
    """How many of the sequences may need a block beyond those for their tokens so far."""

    def num_blocks_held(seq: Sequence) -> int:
        return len(pool.tables.get(seq.seq_id, ())) or pool.num_blocks_for(len(seq.token_ids))

    return sum(most_blocks(seq, pool, max_model_len) > num_blocks_held(seq) for seq in sequences)


def decode(waiting: tuple[Sequence, ...], running: tuple[Sequence, ...], pool: BlockManager) -> Decision:
    """Rule 3. The sequence preempted last becomes the first of waiting, so the order of arrival is kept."""
    scheduled, preempted = (), ()
    for seq in (seq for seq in running if seq.num_left == 1):
        while seq in running and not pool.can_append(seq.seq_id, len(seq.token_ids)):
            running, victim = running[:-1], running[-1]
            waiting = (replace(victim, num_cached_tokens=0), *waiting)
            pool = pool.deallocate(victim.seq_id)
            preempted = (*preempted, victim.seq_id)
        if seq in running:
            pool = pool.append(seq.seq_id, len(seq.token_ids))
            scheduled = (*scheduled, (seq.seq_id, 1))
    return Decision(False, scheduled, waiting, running, pool, num_consecutive_prefills=0, preempted=preempted)


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
