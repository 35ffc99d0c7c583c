"""Scheduler and BlockManager take the decisions of reference.scheduler, step by step, over drawn requests."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

import reference.scheduler as reference
from nanovllm.engine.sequence import Sequence
from reference.block_manager import BlockManager
from tests.unit.engine.harness import make_scheduler, make_sequence, next_token


def computed(decision: reference.Decision) -> reference.Decision:
    """The reference's queues after the step, with the tokens that next_token gives the engine."""
    pool, running, chunks = decision.block_manager, [], dict(decision.scheduled)
    for seq in decision.running:
        if seq.seq_id in chunks:
            seq = replace(seq, num_cached_tokens=seq.num_cached_tokens + chunks[seq.seq_id])
            pool = pool.computed(seq.seq_id, seq.token_ids, seq.num_cached_tokens)
            if seq.num_left == 0:
                seq = replace(seq, token_ids=(*seq.token_ids, next_token(Sequence(list(seq.token_ids)))))
        if len(seq.token_ids) - seq.num_prompt_tokens == seq.max_tokens:
            pool = pool.deallocate(seq.seq_id)
        else:
            running.append(seq)
    return replace(decision, running=tuple(running), block_manager=pool)


@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 8), st.integers(0, 6)),
        min_size=1,
        max_size=7,
    ),
    spare_blocks=st.integers(0, 6),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 16),
)
def test_the_engine_decides_as_the_reference(
    prompts: list[tuple[list[int], int, int]], spare_blocks: int, block_size: int, max_num_seqs: int, budget: int
) -> None:
    """D08, D16, D17: who computes how much, who runs, who waits and which blocks are free is the same at every step.

    Twins end the comparison: of two equal blocks the two may share different ones.
    """
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget, "max_model_len": 64}
    need = max(-(-(len(tokens) + max_tokens - 1) // block_size) for tokens, max_tokens, _ in prompts)
    engine = make_scheduler(need + spare_blocks, block_size, **limits)
    decision = reference.Decision(False, (), (), (), BlockManager(need + spare_blocks, block_size), 0)
    arrivals = sorted(enumerate(prompts), key=lambda item: item[1][2])
    for time in range(3000):
        for seq_id, (tokens, max_tokens, arrival) in arrivals:
            if arrival == time:
                engine.add(make_sequence(tokens, block_size, seq_id=seq_id, max_tokens=max_tokens))
                newcomer = reference.Sequence(seq_id, tuple(tokens), len(tokens), max_tokens)
                decision = replace(decision, waiting=(*decision.waiting, newcomer))
        if time > 6 and engine.is_finished:
            break
        batch = engine.schedule()
        decision = reference.schedule(
            decision.waiting,
            decision.running,
            decision.block_manager,
            num_consecutive_prefills=decision.num_consecutive_prefills,
            **limits,
        )
        assert batch.is_prefill == decision.is_prefill
        ids = [seq.seq_id for seq in batch.sequences]
        assert tuple(zip(ids, batch.num_scheduled_tokens, strict=True)) == decision.scheduled
        assert [seq.seq_id for seq in engine.running] == [seq.seq_id for seq in decision.running]
        assert [seq.seq_id for seq in engine.waiting] == [seq.seq_id for seq in decision.waiting]
        assert engine.block_manager.num_free_blocks == len(decision.block_manager.free)
        engine.postprocess(batch, [next_token(seq) for seq in batch.sampled_sequences])
        decision = computed(decision)
        if engine.block_manager._same_hash:
            return
    assert engine.is_finished
    assert not decision.running
