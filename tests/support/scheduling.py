"""Short ways to make sequences and schedulers, and a step without a model, for the engine's unit tests."""

from collections.abc import Callable
from typing import Any

from nanovllm.engine.block_manager import BlockHash, BlockManager, block_hash
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from tests.support.block_invariants import check_invariants


def two_bit_hash(token_ids: list[int], parent: int | None) -> int:
    """Two bits of the engine's hash, which collide all the time."""
    return block_hash(token_ids, parent) % 4


def make_sequence(
    token_ids: list[int], block_size: int = 4, *, seq_id: int = 0, seed: int = 0, **params: Any
) -> Sequence:
    return Sequence(token_ids, SamplingParams(**params), seq_id=seq_id, block_size=block_size, seed=seed)


def make_scheduler(
    num_blocks: int = 64, block_size: int = 4, *, hash_function: BlockHash = block_hash, **limits: Any
) -> Scheduler:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64, **limits}
    return Scheduler(BlockManager(num_blocks, block_size, hash_function), **limits)


def add_prompt(scheduler: Scheduler, num_tokens: int, seq_id: int = 0, **params: Any) -> Sequence:
    """A prompt that shares no block with that of another seq_id."""
    token_ids = [100 * (seq_id + 1) + position for position in range(num_tokens)]
    seq = make_sequence(token_ids, scheduler.block_manager.block_size, seq_id=seq_id, **params)
    scheduler.add(seq)
    return seq


def allocated(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence with blocks for its tokens, of which only the cached ones are computed."""
    seq = make_sequence(token_ids, manager.block_size)
    manager.allocate(seq)
    return seq


def compute(manager: BlockManager, seq: Sequence) -> Sequence:
    """Mark all tokens of `seq` as computed and stored, as postprocess does."""
    seq.num_cached_tokens = seq.num_tokens_with_kv = len(seq)
    manager.cache_full_blocks(seq)
    return seq


def computed(manager: BlockManager, token_ids: list[int]) -> Sequence:
    return compute(manager, allocated(manager, token_ids))


def next_token(seq: Sequence) -> int:
    """In place of a model: a token that depends on the sequence's tokens alone."""
    return sum(seq.token_ids) % 3 + 1


def step(scheduler: Scheduler, token: Callable[[Sequence], int] = next_token) -> ScheduledBatch:
    batch = scheduler.schedule()
    scheduler.postprocess(batch, [token(seq) for seq in batch.sampled_sequences])
    check_invariants(scheduler.block_manager, scheduler.running)
    return batch


def run(scheduler: Scheduler, token: Callable[[Sequence], int] = next_token) -> list[ScheduledBatch]:
    """Step until all sequences have finished."""
    batches = []
    while not scheduler.is_finished:
        batches.append(step(scheduler, token))
        assert len(batches) < 1000, f"still not finished: {scheduler.running}, {scheduler.waiting}"
    return batches
