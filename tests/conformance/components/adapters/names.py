"""Tables: names that forks give to the same thing, in the order in which they are tried; and how they are looked up.

A name that no table has is NotRecognised: what needs it is reported as not applicable, with the reason, and never as
passed.
"""

from typing import Any

# Options of the Config, of the scheduler and of the block manager.
BLOCK_SIZES = ("block_size", "kvcache_block_size", "kv_cache_block_size")
NUM_BLOCKS = ("num_blocks", "num_kvcache_blocks", "num_kv_cache_blocks")
# Queues of sequences: those that wait, those that hold blocks, those whose blocks are elsewhere.
WAITING = ("waiting", "waiting_queue", "prefilling")
RUNNING = ("running", "running_queue", "decoding")
SWAPPED = ("swapped", "swapped_queue", "swapped_out")
# Attribute of the scheduler -> its block manager.
BLOCK_MANAGERS = ("block_manager", "kvcache_manager", "kv_cache_manager", "cache_manager")
FREE_BLOCKS = ("free_block_ids", "_free_block_ids", "free_blocks", "free_list")
# Blocks that hold a cached prefix and may be taken as the free ones are: their ids, or a mapping to them.
EVICTABLE_BLOCKS = ("cached_block_ids", "cached_blocks", "evictable_block_ids", "evictable_blocks")
# Attribute of a sequence -> how many tokens it computes in the step, if the scheduler sets it.
COUNTS = ("num_scheduled_tokens", "num_new_tokens")
# Attribute of what schedule() returns -> its sequences, and which of them prefill.
BATCH_SEQUENCES = ("sequences", "seqs", "scheduled_seqs", "scheduled")
PREFILL_COUNTS = ("num_prefill_seqs", "num_prefills")
PROMPTS = ("prompt", "prompt_token_ids", "token_ids", "inputs")  # of LLMEngine.add_request
# Parameters of postprocess(): the sequences of the step, and which of them were sampled.
STEP_SEQUENCES = ("seqs", "sequences")
SAMPLED_ROWS = "seq_need_compute_logits"
ABORTS = ("abort", "abort_request", "abort_seq", "cancel")
HASH_FUNCTIONS = ("compute_hash",)
# Of a scheduler that runs ahead of the model: a sequence's number of tokens in flight; or the scheduler's method that
# is given the step in front, and the one that is given the step ahead once the tokens in front are known.
PLACEHOLDERS = ("num_output_placeholders", "num_placeholders")
NEXT_STEP, COMMIT = "schedule_next_async", "commit_async_batch"


def first_of(owner: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if hasattr(owner, name)), None)


def first_value(owner: Any, names: tuple[str, ...]) -> Any:
    name = first_of(owner, names)
    return None if name is None else getattr(owner, name)


def flag(owner: Any, name: str) -> Any:
    """An attribute, or what a method of that name returns; None if there is neither."""
    value = getattr(owner, name, None)
    return value() if callable(value) else value


def describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: {', '.join(type(part).__name__ for part in value)}"
    return f"a {type(value).__name__}"
