"""Postprocess: what a computed step changes: its keys are cached, its tokens are appended, finished sequences leave.

    num_cached_tokens + tokens computed         of each sequence that was scheduled
    blocks that became full                     can be hit from now on
    no token left to compute                    the token sampled from the last one's logits is appended
    that token ends it                          it leaves with "stop"
    else max_tokens or max_model_len reached    it leaves with "length"
    a sequence that leaves                      gives its blocks back

Why a block can be hit only now: before the step was computed, it held nothing. Why the appended token counts as not
cached: it is the input of the next step, which computes its keys; so a running sequence always has a token left to
compute, and one that can decode has exactly one. Why abort is the same as leaving: between two steps, a sequence
consists of its tokens and its blocks only.
"""

from collections.abc import Mapping
from dataclasses import replace

from reference.scheduler import Decision, Sequence


def postprocess(
    decision: Decision, token_ids: Mapping[int, int], max_model_len: int
) -> tuple[Decision, dict[int, str]]:
    """Return (the queues and the pool after the step, and reasons to leave). token_ids: sequence -> its sampled token.

    A prompt of three tokens, of which the step computes two, then the third:

    >>> from reference.block_manager import BlockManager
    >>> from reference.scheduler import schedule
    >>> limits = dict(max_num_seqs=4, max_num_batched_tokens=2, max_model_len=64)
    >>> prompt = Sequence(0, (7, 8, 9), num_prompt_tokens=3, max_tokens=1)
    >>> step = schedule((prompt,), (), BlockManager(num_blocks=4, block_size=2), **limits)
    >>> step, finished = postprocess(step, {}, max_model_len=64)
    >>> step.running[0].num_left, step.block_manager.prefixes, finished
    (1, {0: (7, 8)}, {})
    >>> step = schedule(step.waiting, step.running, step.block_manager, **limits)
    >>> step, finished = postprocess(step, {0: 5}, max_model_len=64)
    >>> step.running, len(step.block_manager.free), finished
    ((), 4, {0: 'length'})
    """
    running, pool, finished = (), decision.block_manager, {}
    computed = dict(decision.scheduled)
    for seq in decision.running:
        seq = replace(seq, num_cached_tokens=seq.num_cached_tokens + computed.get(seq.seq_id, 0))
        pool = pool.computed(seq.seq_id, seq.token_ids, seq.num_cached_tokens)
        if seq.num_left == 0:
            seq = replace(seq, token_ids=(*seq.token_ids, token_ids[seq.seq_id]))
            if reason := finish_reason(seq, max_model_len):
                finished[seq.seq_id] = reason
        running = (*running, seq)
    step = replace(decision, running=running, block_manager=pool, scheduled=())
    for seq_id in finished:
        step = leave(step, seq_id)
    return step, finished


def finish_reason(seq: Sequence, max_model_len: int) -> str | None:
    """Why a sequence that has just got a token ends; None if it goes on."""
    if seq.token_ids[-1] in seq.ending:
        return "stop"
    is_full = len(seq.token_ids) in (seq.num_prompt_tokens + seq.max_tokens, max_model_len)
    return "length" if is_full else None


def leave(decision: Decision, seq_id: int) -> Decision:
    """The same without one sequence, waiting or running: what abort does, also between schedule and postprocess."""

    def without(queue: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
        return tuple(seq for seq in queue if seq.seq_id != seq_id)

    pool = decision.block_manager
    return replace(
        decision,
        waiting=without(decision.waiting),
        running=without(decision.running),
        block_manager=pool.deallocate(seq_id) if seq_id in pool.tables else pool,
    )


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
