"""prepare_prefill, prepare_decode, prepare_decode_async: sequences -> ModelInput, the integers of one forward pass.

Pure functions of the sequences. Every rank calls them, so the ranks compute the same step. No torch.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from itertools import chain

import numpy as np

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.shared_prefix import SharedPrefixes, find_shared_prefixes
from nanovllm.sampling_metadata import SamplingMetadata, make_sampling_metadata

PADDING_SLOT = -1  # in slot_mapping: compute the token, do not store its key and value
PADDING_BLOCK = -1  # in block_tables, after a row's last block
PLACEHOLDER_TOKEN = -1  # in input_ids: the previous step is still computing the token


@dataclass(frozen=True)
class ModelInput:
    """One forward pass over num_tokens packed tokens of num_seqs sequences.

    input_ids, positions, slot_mapping: [num_tokens] int64.
    cu_seqlens_q, cu_seqlens_k: [num_seqs + 1] int32. Keys of a sequence end where its scheduled tokens end.
    max_seqlen_q, max_seqlen_k: the longest of each.
    context_lens: [num_seqs] int32, key lengths.
    sequence_order: [num_seqs] int32, the order in which a kernel starts the sequences: the longest keys first, so that
        the kernel does not end with a single long sequence.
    block_tables: [num_seqs, max_blocks] int32 padded with PADDING_BLOCK.
    reads_cache: False in a prefill in which no sequence has cached keys: then the keys are exactly this step's.
    sample_indices: [num_samples] int64, the sequences that have no token left to compute after this step: the logits of
        their last tokens are sampled.
    sampling: the SamplingMetadata of these num_samples rows.
    input_ids_source: [num_tokens] int64: for a PLACEHOLDER_TOKEN, its row among the tokens that the previous step
        samples; -1 for a token that input_ids holds. None if input_ids holds all.
    shared_prefixes: of a decode step whose sequences share enough of their beginnings, else None.
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
    sequence_order: np.ndarray
    block_tables: np.ndarray
    reads_cache: bool
    sample_indices: np.ndarray
    sampling: SamplingMetadata[np.ndarray]
    input_ids_source: np.ndarray | None = None
    shared_prefixes: SharedPrefixes | None = None


def prepare_prefill(sequences: Sequences[Sequence]) -> ModelInput:
    """The scheduled tokens of each sequence; block tables only if some sequence has cached keys before them."""
    return _prepare_scheduled(sequences, is_prefill=True)


def prepare_decode(sequences: Sequences[Sequence], shares_prefixes: bool = False) -> ModelInput:
    """The last token of each sequence: position len-1, slot block * block_size + (len-1) % block_size.

    shares_prefixes: whether to look for sequences that begin with the same blocks.
    """
    return _prepare_scheduled(sequences, is_prefill=False, shares_prefixes=shares_prefixes)


def prepare_decode_async(
    sequences: Sequences[Sequence], sampled: Sequences[Sequence], shares_prefixes: bool = False
) -> ModelInput:
    """The decode step after the scheduled one, whose tokens are not known yet.

    Equals what prepare_decode returns once the scheduled step is postprocessed, but for the tokens that the scheduled
    step samples, of the sequences `sampled` in this order: they are PLACEHOLDER_TOKEN.
    """
    row_of = {seq: row for row, seq in enumerate(sampled)}
    source = np.array([row_of.get(seq, -1) for seq in sequences], dtype=np.int64)
    return _prepare(
        sequences,
        is_prefill=False,
        shares_prefixes=shares_prefixes,
        starts=_column(sequences, "num_cached_tokens_after_step"),
        query_lens=np.ones(len(sequences), dtype=np.int64),
        token_ids=[PLACEHOLDER_TOKEN if seq in row_of else seq.last_token for seq in sequences],
        sampled=list(range(len(sequences))),
        input_ids_source=source if (source >= 0).any() else None,
    )


def prepare_sample(sequences: Sequences[Sequence], positions: np.ndarray) -> SamplingMetadata[np.ndarray]:
    """How this step samples a token for each of `sequences`, at its position in `positions`."""
    params = [seq.sampling_params for seq in sequences]
    return make_sampling_metadata(
        temperature=np.array([p.temperature for p in params], dtype=np.float32),
        top_k=np.array([p.top_k or 0 for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        seed=np.array([seq.seed for seq in sequences], dtype=np.uint64),
        position=positions,
    )


def _column(sequences: Sequences[Sequence], name: str) -> np.ndarray:
    return np.fromiter((getattr(seq, name) for seq in sequences), np.int64, len(sequences))


def _prepare_scheduled(sequences: Sequences[Sequence], is_prefill: bool, shares_prefixes: bool = False) -> ModelInput:
    return _prepare(
        sequences,
        is_prefill,
        shares_prefixes,
        starts=_column(sequences, "num_cached_tokens"),
        query_lens=_column(sequences, "num_scheduled_tokens"),
        token_ids=chain.from_iterable(seq.scheduled_token_ids for seq in sequences),
        sampled=[index for index, seq in enumerate(sequences) if seq.is_sampled],
    )


def _prepare(
    sequences: Sequences[Sequence],
    is_prefill: bool,
    shares_prefixes: bool,
    *,
    starts: np.ndarray,
    query_lens: np.ndarray,
    token_ids: Iterable[int],
    sampled: list[int],
    input_ids_source: np.ndarray | None = None,
) -> ModelInput:
    """query_lens tokens of each sequence from position starts on.

    Array operations over all sequences, because a Python loop over hundreds of them takes longer than the GPU's step.
    """
    context_lens = starts + query_lens
    query_ends = np.cumsum(query_lens)
    num_tokens = int(query_ends[-1])
    row = np.repeat(np.arange(len(sequences)), query_lens)  # the sequence of each token
    positions = np.arange(num_tokens) + (context_lens - query_ends)[row]
    block_tables, block_size = _block_tables(sequences), sequences[0].block_size
    return ModelInput(
        is_prefill=is_prefill,
        input_ids=np.fromiter(token_ids, np.int64, num_tokens),
        positions=positions,
        slot_mapping=_slots(block_tables, row, positions, _column(sequences, "num_tokens_with_kv"), block_size),
        cu_seqlens_q=_running_sum(query_lens),
        cu_seqlens_k=_running_sum(context_lens),
        max_seqlen_q=int(query_lens.max()),
        max_seqlen_k=int(context_lens.max()),
        context_lens=context_lens.astype(np.int32),
        sequence_order=np.argsort(-context_lens, kind="stable").astype(np.int32),
        block_tables=block_tables,
        reads_cache=not is_prefill or bool(starts.any()),
        sample_indices=np.array(sampled, dtype=np.int64),
        sampling=prepare_sample([sequences[index] for index in sampled], context_lens[sampled]),
        input_ids_source=input_ids_source,
        shared_prefixes=find_shared_prefixes(block_tables, context_lens, block_size) if shares_prefixes else None,
    )


def _slots(
    block_tables: np.ndarray, row: np.ndarray, positions: np.ndarray, num_stored: np.ndarray, block_size: int
) -> np.ndarray:
    """[num_tokens] int64: block * block_size + position % block_size; PADDING_SLOT for what is stored already."""
    blocks = block_tables[row, positions // block_size].astype(np.int64)
    return np.where(positions < num_stored[row], PADDING_SLOT, blocks * block_size + positions % block_size)


def _running_sum(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def _block_tables(sequences: Sequences[Sequence]) -> np.ndarray:
    num_blocks = np.fromiter((len(seq.block_table) for seq in sequences), np.int64, len(sequences))
    tables = np.full((len(sequences), num_blocks.max()), PADDING_BLOCK, dtype=np.int32)
    block_ids = chain.from_iterable(seq.block_table for seq in sequences)
    tables[np.arange(tables.shape[1]) < num_blocks[:, None]] = np.fromiter(block_ids, np.int32, num_blocks.sum())
    return tables
