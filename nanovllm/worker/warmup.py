"""Dummy steps that run on the GPU before the first request, to profile memory and to compile every kernel."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nanovllm.engine.model_input import ModelInput, prepare_decode, prepare_prefill, prepare_sample
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.shared_prefix import SharedPrefixes
from nanovllm.sampling_params import SamplingParams

LONG_CONTEXT = 512  # the smallest number of keys for which varlen_attention launches its kernel for Hopper GPUs


def prepare_profile_run(
    max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int, block_size: int
) -> ModelInput:
    """The largest step that the limits allow: a prefill of the whole token budget that samples max_num_seqs rows.

    One forward pass thus bounds the memory both of the largest prefill, which has fewer sequences, and of the sampler
    in the largest decode step. It runs before the KV cache is allocated, so it neither stores nor reads cached keys.
    """
    params = SamplingParams(top_k=1000, top_p=0.9, min_p=0.01)  # with every filter, sampling takes the most memory
    model_input = dummy_prefill(warmup_lengths(max_num_batched_tokens, max_model_len, max_num_seqs), 0, block_size)
    rows = np.arange(max_num_seqs)
    return replace(
        model_input,
        sample_indices=np.zeros_like(rows),
        sampling=prepare_sample([Sequence([0], params)] * max_num_seqs, rows),
    )


def prefill_warmup_shapes(
    max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int, num_blocks: int, block_size: int
) -> Iterator[tuple[list[int], int]]:
    """Yield (query_lens, num_cached_tokens) of prefills that compile every kernel that a later prefill launches.

    Kernels are specialised on three properties of a step:
    - the range of its number of tokens; each range contains a power of two, so the shapes have ..., 4, 2, 1 tokens,
    - whether it reads cached keys, so each number of tokens appears without and with one cached token,
    - whether it has at least LONG_CONTEXT keys, so the last shape is one token after LONG_CONTEXT cached tokens.

    Shapes that exceed the limits or the cache of num_blocks blocks are left out. The largest shape comes first, because
    the allocator then serves the smaller ones from the same memory.
    """
    num_slots = num_blocks * block_size
    for power in reversed(range(max_num_batched_tokens.bit_length())):
        for num_cached_tokens in (0, 1):
            query_lens = warmup_lengths(2**power, max_model_len - num_cached_tokens, max_num_seqs)
            if sum(query_lens) == 2**power and max(query_lens) + num_cached_tokens <= num_slots:
                yield query_lens, num_cached_tokens
    if min(max_model_len, num_slots) > LONG_CONTEXT:
        yield [1], LONG_CONTEXT


def warmup_lengths(num_tokens: int, max_model_len: int, max_num_seqs: int) -> list[int]:
    """Divide num_tokens into at most max_num_seqs lengths of at most max_model_len.

    The sum of the lengths is less than num_tokens if these limits allow no more.
    """
    num_full, remainder = divmod(num_tokens, max_model_len)
    return ([max_model_len] * num_full + [remainder] * (remainder > 0))[:max_num_seqs]


def dummy_decode(num_seqs: int, block_size: int, shares_prefix: bool = False) -> ModelInput:
    """A decode step of sequences that all have the same two tokens. It must not be computed."""
    seq = Sequence([0, 0], block_size=block_size)
    seq.block_table, seq.num_cached_tokens, seq.num_scheduled_tokens = [0], 1, 1
    model_input = prepare_decode([seq] * num_seqs)
    if not shares_prefix:
        return model_input
    order = np.arange(num_seqs, dtype=np.int32)
    return replace(model_input, shared_prefixes=SharedPrefixes(order, lens=np.zeros_like(order)))


def dummy_prefill(query_lens: list[int], num_cached_tokens: int, block_size: int) -> ModelInput:
    """A prefill of sequences that share their blocks. It does not write to the KV cache.

    Each sequence reads num_cached_tokens cached keys of any value, because the outputs are discarded.
    """
    sequences = []
    for query_len in query_lens:
        seq = Sequence([0] * (num_cached_tokens + query_len), block_size=block_size)
        seq.block_table = list(range(seq.num_blocks))
        seq.num_cached_tokens, seq.num_scheduled_tokens = num_cached_tokens, query_len
        seq.num_tokens_with_kv = len(seq)
        sequences.append(seq)
    return prepare_prefill(sequences)
