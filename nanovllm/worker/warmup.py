"""warmup_input: the largest step that the limits allow. Pure, no torch."""

from dataclasses import replace

import numpy as np

from nanovllm.engine.model_input import ModelInput, prepare_prefill, sampling_rows
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

# Every filter on: the sampler's most expensive way.
_SAMPLING_PARAMS = SamplingParams(top_k=1000, top_p=0.9, min_p=0.01)


def warmup_input(max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int, block_size: int) -> ModelInput:
    """A prefill of the whole token budget, by sequences of max_model_len tokens and a shorter one for the rest.

    It samples max_num_seqs rows, more than such a prefill has sequences: so one pass bounds both the largest prefill and
    the sampler of the largest decode step. The sequences have no blocks, so nothing is stored.
    """
    lengths = warmup_lengths(max_num_batched_tokens, max_model_len, max_num_seqs)
    sequences = [_sequence(length, block_size) for length in lengths]
    model_input = prepare_prefill(sequences)
    rows = np.arange(max_num_seqs)
    return replace(
        model_input,
        sample_indices=rows % len(model_input.input_ids),
        sampling=sampling_rows([sequences[row % len(sequences)] for row in rows]),
    )


def warmup_lengths(max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int) -> list[int]:
    """At most max_num_seqs lengths of at most max_model_len that add up to as much of the token budget as they can."""
    num_whole, rest = divmod(max_num_batched_tokens, max_model_len)
    return ([max_model_len] * num_whole + [rest] * (rest > 0))[:max_num_seqs]


def _sequence(length: int, block_size: int) -> Sequence:
    seq = Sequence([0] * length, _SAMPLING_PARAMS, block_size=block_size)
    seq.num_scheduled_tokens = length
    return seq
