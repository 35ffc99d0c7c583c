"""A ModelRunner alone, and its logits of every position: prefill in chunks over a paged cache, then decode."""

from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine.model_input import prepare_decode, prepare_prefill
from nanovllm.engine.sequence import Sequence
from nanovllm.models.registry import load_model_config
from nanovllm.worker.model_runner import ModelRunner


def make_runner(model_dir: Path, **options: Any) -> ModelRunner:
    """A ModelRunner alone, without engine and tokenizer."""
    return ModelRunner(Config(str(model_dir), **options), load_model_config(model_dir), model_dir)


def teacher_forced_logits(
    runner: ModelRunner, token_ids: list[int], chunks: list[int], block_table: list[int]
) -> torch.Tensor:
    """Logits [len(token_ids), V] on the CPU: prefill in `chunks`, then the rest token by token.

    block_table: any distinct block ids, enough for the tokens.
    """
    seq = Sequence(token_ids, block_size=runner.block_size)
    seq.block_table = block_table
    logits = []
    sizes = [*chunks, *[1] * (len(token_ids) - sum(chunks))]
    for index, size in enumerate(sizes):
        seq.num_scheduled_tokens = size
        prepare = prepare_prefill if index < len(chunks) else prepare_decode
        with torch.inference_mode():
            logits.append(runner.model.compute_logits(runner.run_model(prepare([seq]))).cpu())
        seq.num_cached_tokens += size
        seq.num_tokens_with_kv = seq.num_cached_tokens
    return torch.cat(logits)
