"""What the engine's unit tests share: short ways to make sequences and schedulers, and a step without a model."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

from hypothesis import strategies as st

from nanovllm.engine.block_manager import BlockManager, block_hash
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

# Prompts of two letters, and of one: prefixes, blocks and whole prompts repeat.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20) | st.integers(1, 20).map(lambda length: [0] * length)


def two_bit_hash(token_ids: list[int], parent: int | None) -> int:
    """The engine's hash less 62 of its bits: it collides all the time, and so do its chains."""
    return block_hash(token_ids, parent) % 4


class Collisions:
    """Counts pairs of different prefixes that a manager has held under one hash at the same time."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._seen: set[tuple[int, int]] = set()

    @property
    def number(self) -> int:
        return len(self._seen)

    def count(self) -> None:
        """Look at what the manager holds now."""
        prefixes: dict[int, set[int]] = {}
        for block in self._manager.blocks:
            if block.hash is not None and block.prefix_id is not None:
                prefixes.setdefault(block.hash, set()).add(block.prefix_id)
        for ids in prefixes.values():
            self._seen.update(combinations(sorted(ids), 2))


def make_sequence(
    token_ids: list[int], block_size: int = 4, *, seq_id: int = 0, seed: int = 0, **params: Any
) -> Sequence:
    return Sequence(token_ids, SamplingParams(**params), seq_id=seq_id, block_size=block_size, seed=seed)


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 64,
    max_supported_len: int | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
    hash_function: Callable[[list[int], int | None], int] = block_hash,
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size, hash_function),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_supported_len=max_supported_len,
        eos_token_ids=eos_token_ids,
    )


def add_prompt(scheduler: Scheduler, num_tokens: int, seq_id: int = 0, **params: Any) -> Sequence:
    """A prompt that shares no block with that of another seq_id."""
    token_ids = [100 * (seq_id + 1) + position for position in range(num_tokens)]
    seq = make_sequence(token_ids, scheduler.block_manager.block_size, seq_id=seq_id, **params)
    scheduler.add(seq)
    return seq


def allocated(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence that owns blocks for its tokens, none of them computed but what the cache held."""
    seq = make_sequence(token_ids, manager.block_size)
    manager.allocate(seq)
    return seq


def compute(manager: BlockManager, seq: Sequence) -> Sequence:
    """All of its tokens are computed and stored: what postprocess does after the step of the last one."""
    seq.num_cached_tokens = seq.num_tokens_with_kv = len(seq)
    manager.cache_full_blocks(seq)
    return seq


def computed(manager: BlockManager, token_ids: list[int]) -> Sequence:
    return compute(manager, allocated(manager, token_ids))


def next_token(seq: Sequence) -> int:
    """What stands for the model: a token that depends on the sequence's tokens and nothing else."""
    return sum(seq.token_ids) % 3 + 1


def step(scheduler: Scheduler, token: Callable[[Sequence], int] = next_token) -> ScheduledBatch:
    batch = scheduler.schedule()
    scheduler.postprocess(batch, [token(seq) for seq in batch.sampled_sequences])
    scheduler.block_manager.check_invariants(scheduler.running)
    return batch


def run(
    scheduler: Scheduler, token: Callable[[Sequence], int] = next_token, max_steps: int = 1000
) -> list[ScheduledBatch]:
    """Steps until nothing is left."""
    batches = []
    for _ in range(max_steps):
        if scheduler.is_finished:
            return batches
        batches.append(step(scheduler, token))
    raise AssertionError(f"not finished after {max_steps} steps: {scheduler.running}, {scheduler.waiting}")
