"""The host's part of a decode step at 256 running sequences, and of a prefill step: plain Python and numpy, no GPU.

benchmarks/hosting.py says how they are compared.
"""

import pickle
from itertools import count

import pytest

from benchmarks.hosting import ROUNDS, WARMUP_ROUNDS
from benchmarks.shapes import draw_lens
from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_input import prepare_decode, prepare_decode_async, prepare_prefill
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence

NUM_SEQS = 256
BLOCK_SIZE = 256
MAX_TOKENS = 100_000  # no sequence finishes while the time is taken
NUM_RUNS = ROUNDS + WARMUP_ROUNDS


def make_scheduler() -> Scheduler:
    return Scheduler(
        BlockManager(NUM_SEQS * 500, BLOCK_SIZE),
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=16384,
        max_model_len=2 * MAX_TOKENS,
    )


def make_sequence(seq_id: int, length: int) -> Sequence:
    """Prompts differ in their first token, so that no two share a block."""
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    return Sequence([seq_id, *range(length - 1)], params, seq_id=seq_id, block_size=BLOCK_SIZE, seed=seq_id)


def advance(scheduler: Scheduler) -> ScheduledBatch:
    batch = scheduler.schedule()
    scheduler.postprocess(batch, [7] * len(batch.sampled_sequences))
    return batch


@pytest.fixture
def running() -> Scheduler:
    """NUM_SEQS sequences of 100 to 1800 tokens that decode."""
    scheduler = make_scheduler()
    for seq_id, length in enumerate(draw_lens(NUM_SEQS, 100, 1800)):
        scheduler.add(make_sequence(seq_id, length))
    while scheduler.waiting or not all(seq.is_decodable for seq in scheduler.running):
        advance(scheduler)
    return scheduler


def test_scheduler_decode_step(host, running):
    """schedule and postprocess."""
    batch = host(lambda: advance(running))
    assert batch.num_scheduled_tokens == (1,) * NUM_SEQS


def test_scheduler_decode_step_ahead(host, running):
    """schedule_next_async, postprocess and commit_async_batch."""
    batch = running.schedule()

    def advance_ahead():
        nonlocal batch
        ahead = running.schedule_next_async(batch)
        running.postprocess(batch, [7] * NUM_SEQS)
        batch = running.commit_async_batch(ahead)

    host(advance_ahead)
    assert batch.num_scheduled_tokens == (1,) * NUM_SEQS


def test_prepare_decode_async(host, running):
    batch = running.schedule()
    sequences = running.schedule_next_async(batch).sequences
    model_input = host(lambda: prepare_decode_async(sequences, batch.sampled_sequences))
    assert len(model_input.input_ids) == NUM_SEQS


def test_prepare_decode(host, running):
    sequences = running.schedule().sequences
    model_input = host(lambda: prepare_decode(sequences))
    assert len(model_input.input_ids) == NUM_SEQS


def test_prepare_prefill(host):
    """16 prompts of 1024 tokens."""
    scheduler = make_scheduler()
    for seq_id in range(16):
        scheduler.add(make_sequence(seq_id, 1024))
    sequences = scheduler.schedule().sequences
    model_input = host(lambda: prepare_prefill(sequences))
    assert len(model_input.input_ids) == 16 * 1024


def test_block_manager_allocate(host):
    """One prompt of 1024 tokens, none of them cached."""
    manager = BlockManager(10_000, BLOCK_SIZE)
    ids = count()

    host(manager.allocate, prepare=lambda: make_sequence(next(ids), 1024))
    assert manager.num_hit_blocks == 0


def test_block_manager_allocate_cached(host):
    """One prompt of 1024 tokens, of which all four blocks are in the cache."""
    manager = BlockManager(100, BLOCK_SIZE)
    seq = make_sequence(0, 1024)
    manager.allocate(seq)
    seq.num_tokens_with_kv = 1024
    manager.cache_full_blocks(seq)
    manager.deallocate(seq)

    num_allocated = count(1)

    def prepare():
        next(num_allocated)
        return make_sequence(0, 1024)

    host(manager.allocate, prepare=prepare, teardown=manager.deallocate)
    assert manager.num_hit_blocks == 4 * (next(num_allocated) - 1)


def test_block_manager_append(host, running):
    """One new token for each of 256 sequences, of which one in 256 needs a new block."""
    manager, sequences = running.block_manager, tuple(running.running)
    num_free_at_start = manager.num_free_blocks

    def add_tokens():
        for seq in sequences:
            seq.append_token(7)
        return sequences

    def append(sequences):
        for seq in sequences:
            manager.append(seq)

    host(append, prepare=add_tokens)
    assert num_free_at_start - manager.num_free_blocks > NUM_RUNS / 2
    assert all(len(seq.block_table) == -(-len(seq) // BLOCK_SIZE) for seq in sequences)


def test_pickling_a_decode_batch(host, running):
    """What a decode step sends to another rank."""
    batch = running.schedule()
    assert len(host(lambda: pickle.dumps(batch))) < 2**20  # D31
