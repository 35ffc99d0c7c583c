"""prepare_prefill and prepare_decode: scheduled sequences -> ModelInput, the integers of one forward pass.

Pure functions of the sequences, called by every rank, so that the ranks cannot disagree. No torch.
"""

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, replace

import numpy as np

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

PADDING_SLOT = -1  # in slot_mapping: compute the token, do not store its key and value
PADDING_BLOCK = -1  # in block_tables, after a row's last block


@dataclass(frozen=True)
class SamplingRows:
    """How the sampled rows are drawn; one entry for each of num_samples sequences.

    temperature [num_samples] float32; top_k int64, 0 for no limit; top_p, min_p float32; seed uint64;
    position int64: the place that the sampled token takes in its sequence.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray


@dataclass(frozen=True)
class ModelInput:
    """One forward pass over num_tokens packed tokens of num_seqs sequences.

    input_ids, positions, slot_mapping: [num_tokens] int64.
    cu_seqlens_q, cu_seqlens_k: [num_seqs + 1] int32. Keys of a sequence end where its scheduled tokens end.
    max_seqlen_q, max_seqlen_k: the longest of each.
    context_lens: [num_seqs] int32, key lengths.
    block_tables: [num_seqs, max_blocks] int32 padded with PADDING_BLOCK; None in a prefill without cached keys.
    sample_indices: [num_samples] int64, the packed tokens whose logits are sampled: the last token of each sequence
        that has no token left to compute afterwards.
    sampling: their SamplingRows.
    """

    is_prefill: bool
    input_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray
    max_seqlen_q: int
    max_seqlen_k: int
    context_lens: np.ndarray
    block_tables: np.ndarray | None
    sample_indices: np.ndarray
    sampling: SamplingRows


def prepare_prefill(sequences: Sequences[Sequence]) -> ModelInput:
    """The scheduled tokens of each sequence; block tables only where some sequence has cached keys before them."""
    return _prepare(sequences, is_prefill=True)


def prepare_decode(sequences: Sequences[Sequence]) -> ModelInput:
    """The last token of each sequence: position len-1, slot block * block_size + (len-1) % block_size."""
    return _prepare(sequences, is_prefill=False)


def prepare_warmup(max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int, block_size: int) -> ModelInput:
    """The largest step that the limits allow: a prefill of the whole token budget that samples max_num_seqs rows.

    Sequences of max_model_len tokens, and a shorter one for the rest. So large a prefill has fewer sequences than rows
    are sampled: one pass bounds both the largest prefill and the sampler of the largest decode step. The sequences have
    no blocks, so nothing is stored.
    """
    params = SamplingParams(top_k=1000, top_p=0.9, min_p=0.01)  # every filter on: the sampler's most expensive way
    sequences = []
    for length in warmup_lengths(max_num_batched_tokens, max_model_len, max_num_seqs):
        seq = Sequence([0] * length, params, block_size=block_size)
        seq.num_scheduled_tokens = length
        sequences.append(seq)
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


def _prepare(sequences: Sequences[Sequence], is_prefill: bool) -> ModelInput:
    input_ids: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    for seq in sequences:
        span = np.arange(seq.num_cached_tokens, seq.num_cached_tokens + seq.num_scheduled_tokens, dtype=np.int64)
        input_ids.extend(seq.scheduled_token_ids)
        positions.append(span)
        slots.append(slot_mapping(seq, span))
    query_lens = np.array([seq.num_scheduled_tokens for seq in sequences], dtype=np.int32)
    context_lens = np.array([seq.num_cached_tokens for seq in sequences], dtype=np.int32) + query_lens
    has_cached_keys = not np.array_equal(query_lens, context_lens)
    last_tokens = np.cumsum(query_lens, dtype=np.int64) - 1
    sampled = [index for index, seq in enumerate(sequences) if seq.is_sampled]
    return ModelInput(
        is_prefill=is_prefill,
        input_ids=np.array(input_ids, dtype=np.int64),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots),
        cu_seqlens_q=_running_sum(query_lens),
        cu_seqlens_k=_running_sum(context_lens),
        max_seqlen_q=int(query_lens.max()),
        max_seqlen_k=int(context_lens.max()),
        context_lens=context_lens,
        block_tables=_block_tables(sequences) if has_cached_keys or not is_prefill else None,
        sample_indices=last_tokens[sampled],
        sampling=sampling_rows([sequences[index] for index in sampled]),
    )


def slot_mapping(seq: Sequence, positions: np.ndarray) -> np.ndarray:
    """Slots of `positions` [n] int64; PADDING_SLOT for those already stored, and for a sequence without blocks.

    A sequence has no blocks in warm-up, before there is a cache.
    """
    if not seq.block_table:
        return np.full(len(positions), PADDING_SLOT, dtype=np.int64)
    blocks = np.array(seq.block_table, dtype=np.int64)[positions // seq.block_size]
    slots = blocks * seq.block_size + positions % seq.block_size
    return np.where(positions < seq.num_stored_tokens, PADDING_SLOT, slots)


def sampling_rows(sequences: Sequences[Sequence]) -> SamplingRows:
    """The SamplingRows of sequences that are sampled in this step."""
    params = [seq.sampling_params for seq in sequences]
    return SamplingRows(
        temperature=np.array([p.temperature for p in params], dtype=np.float32),
        top_k=np.array([p.top_k or 0 for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        seed=np.array([seq.seed for seq in sequences], dtype=np.uint64),
        position=np.array([seq.num_tokens for seq in sequences], dtype=np.int64),
    )


def _running_sum(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def _block_tables(sequences: Sequences[Sequence]) -> np.ndarray:
    width = max(len(seq.block_table) for seq in sequences)
    tables = np.full((len(sequences), width), PADDING_BLOCK, dtype=np.int32)
    for row, seq in zip(tables, sequences, strict=True):
        row[: len(seq.block_table)] = seq.block_table
    return tables
