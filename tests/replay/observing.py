"""What of a scheduler's decisions is recorded, and compared when they are replayed."""

from dataclasses import MISSING, asdict, fields
from typing import Any

from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

DEFAULT_PARAMS = {field.name: field.default for field in fields(SamplingParams) if field.default is not MISSING}


def limits_of(scheduler: Scheduler) -> dict[str, Any]:
    return {
        "num_blocks": len(scheduler.block_manager.blocks),
        "block_size": scheduler.block_manager.block_size,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_model_len": scheduler.max_model_len,
        "eos_token_ids": sorted(scheduler.eos_token_ids),
    }


def request_of(seq: Sequence) -> dict[str, Any]:
    """An arrival; of its parameters, those that are not SamplingParams' defaults."""
    params = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(seq.sampling_params).items()
        if value != DEFAULT_PARAMS[name]
    }
    return {"seq": seq.seq_id, "prompt": list(seq.token_ids), "params": params, "seed": seq.seed}


def decision_of(scheduler: Scheduler, batch: ScheduledBatch) -> dict[str, Any]:
    """What schedule() decided."""
    return {
        "is_prefill": batch.is_prefill,
        "batch": [
            {
                "seq": seq.seq_id,
                "scheduled": num_scheduled,
                "cached": seq.num_cached_tokens,
                "stored": seq.num_stored_tokens,
                "table": list(seq.block_table),
                "hashes": list(seq.block_hashes),
            }
            for seq, num_scheduled in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)
        ],
        "sampled": [seq.seq_id for seq in batch.sampled_sequences],
        "running": [seq.seq_id for seq in scheduler.running],
        "waiting": [seq.seq_id for seq in scheduler.waiting],
        "free_blocks": scheduler.block_manager.num_free_blocks,
    }


def endings_of(batch: ScheduledBatch) -> list[list[Any]]:
    """[seq_id, finish_reason] of the batch's sequences that have ended."""
    return [[seq.seq_id, seq.finish_reason] for seq in batch.sequences if seq.is_finished]


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
