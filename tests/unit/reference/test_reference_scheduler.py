"""scheduler: its policy case by case, and what must hold of every run of it over drawn requests."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.block_manager import BlockManager
from reference.postprocess import leave, postprocess
from reference.scheduler import MAX_CONSECUTIVE_PREFILLS, Decision, Sequence, fits, schedule

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64}


def request(seq_id: int, num_tokens: int, max_tokens: int = 4) -> Sequence:
    """A prompt that shares no token with that of any other seq_id."""
    return Sequence(seq_id, tuple(100 * seq_id + i for i in range(num_tokens)), num_tokens, max_tokens)


def computed(decision: Decision) -> Decision:
    """The queues after the step; the next token depends on the last one."""
    tokens = {seq.seq_id: seq.token_ids[-1] % 2 for seq in decision.running}
    return postprocess(decision, tokens, LIMITS["max_model_len"])[0]


def run(waiting: tuple[Sequence, ...], num_blocks: int, block_size: int = 2, **limits: int) -> Iterator[Decision]:
    """Every decision until both queues are empty."""
    step = Decision(False, (), waiting, (), BlockManager(num_blocks, block_size), 0)
    for _ in range(3000):
        if not step.waiting and not step.running:
            return
        step = schedule(
            step.waiting,
            step.running,
            step.block_manager,
            num_consecutive_prefills=step.num_consecutive_prefills,
            **{**LIMITS, **limits},
        )
        yield step
        step = computed(step)
    raise AssertionError("the queues never emptied")


def test_a_long_prompt_is_cut_into_chunks_and_the_next_one_uses_what_is_left_of_the_budget() -> None:
    steps = list(run((request(0, 10, 1), request(1, 3, 1)), num_blocks=20, max_num_batched_tokens=4))
    assert [step.scheduled for step in steps] == [((0, 4),), ((0, 4),), ((0, 2), (1, 2)), ((1, 1),)]


def test_a_chunk_is_counted_after_the_prefix_hit() -> None:
    """D06: of 7 tokens 4 are cached, so 3 are scheduled."""
    pool = BlockManager(8, 2)
    prompt = tuple(range(7))
    pool = pool.allocate("earlier", prompt)[0].computed("earlier", prompt, 5).deallocate("earlier")
    decision = schedule((Sequence(0, prompt, 7, 4),), (), pool, **LIMITS)
    assert decision.scheduled == ((0, 3),)
    assert decision.running[0].num_cached_tokens == 4


@pytest.mark.parametrize(
    ("num_requests", "max_tokens", "max_model_len", "num_blocks"),
    [
        (2, 9, 64, 6),  # each holds 2 blocks and will open another
        (2, 1, 64, 4),  # the one token sampled is never stored, so the prompt's blocks suffice
        (2, 9, 5, 4),  # max_model_len is the limit
        (1, 5, 64, 2),  # no reserve for a sequence alone
    ],
)
def test_a_reserve_is_kept_for_those_that_will_grow(
    num_requests: int, max_tokens: int, max_model_len: int, num_blocks: int
) -> None:
    """D17: num_blocks are just enough to admit prompts of 4 tokens, 2 blocks each."""
    waiting = tuple(request(i, 4, max_tokens) for i in range(num_requests))
    for blocks, num_admitted in ((num_blocks, num_requests), (num_blocks - 1, num_requests - 1)):
        decision = schedule(waiting, (), BlockManager(blocks, 2), **{**LIMITS, "max_model_len": max_model_len})
        assert len(decision.running) == num_admitted


def growing(num_blocks: int) -> Decision:
    """The decision on two sequences of 4 tokens in 2 blocks of 2 each, about to decode their fifth."""
    pool = BlockManager(num_blocks, 2)
    running = []
    for seq_id in (0, 1):
        seq = request(seq_id, 4, max_tokens=6)
        pool = pool.allocate(seq_id, seq.token_ids)[0].computed(seq_id, seq.token_ids, 4)
        running.append(replace(seq, token_ids=(*seq.token_ids, 7), num_cached_tokens=4))
    return schedule((request(2, 9),), tuple(running), pool, **LIMITS)


def test_without_a_block_the_last_running_sequence_is_preempted_to_the_front_of_waiting() -> None:
    """D08: it keeps all tokens it had, and starts again from none cached."""
    decision = growing(num_blocks=5)
    assert not decision.is_prefill
    assert decision.scheduled == ((0, 1),)
    assert decision.preempted == (1,)
    assert [seq.seq_id for seq in decision.waiting] == [1, 2]
    assert decision.waiting[0].token_ids == (100, 101, 102, 103, 7)
    assert decision.waiting[0].num_cached_tokens == 0
    assert set(decision.block_manager.tables) == {0}
    assert growing(num_blocks=6).preempted == ()


def test_fits_accepts_what_can_finish_alone_and_has_room_for_one_more_token() -> None:
    """D10, D11: the last token sampled is never stored, so 3 + 2 tokens fit in 4 slots, and 3 + 3 do not."""
    pool = BlockManager(2, 2)
    assert fits(request(0, 3, max_tokens=2), pool, max_model_len=64)
    assert not fits(request(0, 3, max_tokens=3), pool, max_model_len=64)
    assert fits(request(0, 3, max_tokens=99), pool, max_model_len=5)
    assert fits(request(0, 4, max_tokens=1), pool, max_model_len=5)
    assert not fits(request(0, 5, max_tokens=1), pool, max_model_len=5)


@pytest.mark.parametrize(
    ("token", "max_tokens", "max_model_len", "reason"),
    [(1, 9, 64, None), (7, 9, 64, "stop"), (1, 1, 64, "length"), (7, 1, 64, "stop"), (1, 9, 5, "length")],
)
def test_a_sequence_with_its_last_token_leaves_with_the_reason(
    token: int, max_tokens: int, max_model_len: int, reason: str | None
) -> None:
    """D11, D70: a prompt of 4; 7 ends it."""
    seq = replace(request(0, 4, max_tokens), ending=frozenset({7}))
    step = schedule((seq,), (), BlockManager(4, 2), **{**LIMITS, "max_model_len": max_model_len})
    step, finished = postprocess(step, {0: token}, max_model_len)
    assert finished == ({0: reason} if reason else {})
    assert [running.token_ids[-1] for running in step.running] == ([] if reason else [token])
    assert len(step.block_manager.free) == (4 if reason else 2)
    assert len(step.block_manager.hits(seq.token_ids)) == 2, "its blocks stay hittable"


def test_a_sequence_that_leaves_during_a_step_gets_no_token() -> None:
    """D19: running, waiting, and between schedule and postprocess; nothing of it becomes hittable."""
    step = schedule(
        (request(0, 4), request(1, 4), request(2, 4)), (), BlockManager(8, 2), **{**LIMITS, "max_num_seqs": 2}
    )
    for gone in (0, 2):
        step = leave(step, gone)
    assert (set(step.block_manager.tables), len(step.block_manager.free)) == ({1}, 6)
    step, _ = postprocess(step, {0: 5, 1: 6}, 64)
    assert [seq.token_ids[-1] for seq in step.running] == [6]
    assert step.waiting == ()
    assert step.block_manager.hits(request(0, 4).token_ids) == ()


def test_decoding_gets_its_turn_under_steady_arrivals() -> None:
    """D15: a newcomer at every step, and still at most MAX_CONSECUTIVE_PREFILLS steps between two decodes."""
    pool, waiting, running, count = BlockManager(200, 2), (request(0, 2, 50),), (), 0
    kinds = []
    for arrival in range(1, 40):
        step = schedule(
            waiting,
            running,
            pool,
            max_num_seqs=64,
            max_num_batched_tokens=8,
            max_model_len=64,
            num_consecutive_prefills=count,
        )
        kinds.append("p" if step.is_prefill else "d")
        step = computed(step)
        waiting, running, pool = (*step.waiting, request(arrival, 2, 50)), step.running, step.block_manager
        count = step.num_consecutive_prefills
    assert "".join(kinds) == (("p" * MAX_CONSECUTIVE_PREFILLS + "d") * 5)[:39]


@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 8)), min_size=1, max_size=7
    ),
    spare_blocks=st.integers(0, 6),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 16),
)
@settings(deadline=None, max_examples=150)
def test_every_run_keeps_its_limits_and_starves_no_request(
    prompts: list[tuple[list[int], int]], spare_blocks: int, block_size: int, max_num_seqs: int, budget: int
) -> None:
    requests = tuple(Sequence(i, tuple(tokens), len(tokens), n) for i, (tokens, n) in enumerate(prompts))
    need = max(-(-(r.num_prompt_tokens + r.max_tokens - 1) // block_size) for r in requests)
    steps = list(
        run(requests, need + spare_blocks, block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    )
    since_decode = 0
    for step in steps:
        chunks = dict(step.scheduled)
        left = {seq.seq_id: seq.num_left for seq in step.running}
        assert step.scheduled, "every step computes something"
        assert len(step.running) <= max_num_seqs
        assert sum(chunks.values()) <= budget
        assert all(1 <= chunk <= left[seq_id] for seq_id, chunk in chunks.items())
        for seq in step.running:
            held = len(step.block_manager.tables[seq.seq_id]) * block_size
            assert held >= seq.num_cached_tokens + chunks.get(seq.seq_id, 0), "what is computed has a slot"
        order = [seq.seq_id for seq in (*step.running, *step.waiting)]
        assert order == sorted(order), "first come, first served, through every preemption"
        since_decode = since_decode + 1 if step.is_prefill else 0
        assert since_decode <= MAX_CONSECUTIVE_PREFILLS or not any(n == 1 and i not in chunks for i, n in left.items())
    assert steps[-1].block_manager.tables.keys() == {i for i, _ in steps[-1].scheduled}
