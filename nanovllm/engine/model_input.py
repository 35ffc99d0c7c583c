"""prepare_prefill, prepare_decode, prepare_decode_async: scheduled sequences -> ModelInput.

Pure functions of the sequences, called by every rank, so that the ranks cannot disagree. No torch.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

LONG_CONTEXT = 512  # keys from which the prefill kernel for Hopper GPUs is taken
PADDING_SLOT = -1  # in slot_mapping: compute the token, do not store its key and value
PADDING_BLOCK = -1  # in block_tables, after a row's last block
PLACEHOLDER_TOKEN = -1  # in input_ids, of a token that the step before is still computing


@dataclass(frozen=True)
class SamplingMetadata:
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
    sequence_order: [num_seqs] int32, the sequences by falling key length: a kernel that starts the longest first does
    not end waiting for it.
    block_tables: [num_seqs, max_blocks] int32 padded with PADDING_BLOCK; None in a prefill without cached keys.
    sample_indices: [num_samples] int64, the packed tokens whose logits are sampled: the last token of each sequence
        that has no token left to compute afterwards.
    sampling: their SamplingMetadata.
    input_ids_source: [num_tokens] int64, for each PLACEHOLDER_TOKEN of input_ids its row among those that the step
        before samples, -1 for the others; None when all are known.
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
    block_tables: np.ndarray | None
    sample_indices: np.ndarray
    sampling: SamplingMetadata
    input_ids_source: np.ndarray | None = None


def prepare_prefill(sequences: Sequences[Sequence]) -> ModelInput:
    """The scheduled tokens of each sequence; block tables only where some sequence has cached keys before them."""
    return _prepare_scheduled(sequences, is_prefill=True)


def prepare_decode(sequences: Sequences[Sequence]) -> ModelInput:
    """The last token of each sequence: position len-1, slot block * block_size + (len-1) % block_size."""
    return _prepare_scheduled(sequences, is_prefill=False)


def prepare_decode_async(sequences: Sequences[Sequence], sampled: Sequences[Sequence]) -> ModelInput:
    """As prepare_decode will, when the scheduled step has been taken in: but its tokens, which `sampled` get in this
    order, are unknown.
    """
    row_of = {seq: row for row, seq in enumerate(sampled)}
    source = np.array([row_of.get(seq, -1) for seq in sequences], dtype=np.int64)
    model_input = _prepare(
        sequences,
        is_prefill=False,
        starts=_numbers(sequences, "num_cached_tokens_after_step"),
        query_lens=np.ones(len(sequences), dtype=np.int64),
        num_stored=_numbers(sequences, "num_tokens_with_kv"),
        token_ids=[PLACEHOLDER_TOKEN if seq in row_of else seq.last_token for seq in sequences],
        sampled=list(range(len(sequences))),
    )
    return replace(model_input, input_ids_source=source if (source >= 0).any() else None)


def prepare_profile_run(
    max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int, block_size: int
) -> ModelInput:
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
        sampling=prepare_sample([sequences[row % len(sequences)] for row in rows], rows),
    )


def warmup_lengths(max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int) -> list[int]:
    """At most max_num_seqs lengths of at most max_model_len that add up to as much of the token budget as they can."""
    num_whole, rest = divmod(max_num_batched_tokens, max_model_len)
    return ([max_model_len] * num_whole + [rest] * (rest > 0))[:max_num_seqs]


def prefill_warmup_shapes(
    max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int, num_blocks: int, block_size: int
) -> Iterator[ModelInput]:
    """Prefills after which no other one compiles anything, as far as the limits and the cache have room for them.

    ..., 4, 2, 1 tokens (the largest first: its memory serves the smaller ones), each number without and with cached
    keys; and one token after LONG_CONTEXT cached ones. Kernels are chosen and compiled by such differences, and what is
    chosen by the number of tokens is chosen for ranges in each of which there is a power of two. Nothing is stored.
    What is read of the cache may be anything: the outputs are not used.
    """
    for power in reversed(range(max_num_batched_tokens.bit_length())):
        for num_cached in (0, 1):
            lengths = warmup_lengths(2**power, max_model_len - num_cached, max_num_seqs)
            if sum(lengths) == 2**power:
                yield from dummy_prefill(lengths, num_cached, num_blocks, block_size)
    if max_model_len > LONG_CONTEXT:
        yield from dummy_prefill([1], LONG_CONTEXT, num_blocks, block_size)


def dummy_prefill(lengths: list[int], num_cached: int, num_blocks: int, block_size: int) -> Iterator[ModelInput]:
    """lengths tokens after num_cached, of sequences that share their blocks; nothing if the cache has too few."""
    sequences = []
    for length in lengths:
        seq = Sequence([0] * (num_cached + length), block_size=block_size)
        seq.block_table = list(range(seq.num_blocks))
        seq.num_cached_tokens, seq.num_scheduled_tokens = num_cached, length
        seq.num_tokens_with_kv = num_cached + length
        sequences.append(seq)
    if max(seq.num_blocks for seq in sequences) <= num_blocks:
        yield prepare_prefill(sequences)


def _numbers(sequences: Sequences[Sequence], name: str) -> np.ndarray:
    return np.fromiter((getattr(seq, name) for seq in sequences), np.int64, len(sequences))


def _prepare_scheduled(sequences: Sequences[Sequence], is_prefill: bool) -> ModelInput:
    return _prepare(
        sequences,
        is_prefill,
        starts=_numbers(sequences, "num_cached_tokens"),
        query_lens=_numbers(sequences, "num_scheduled_tokens"),
        num_stored=_numbers(sequences, "num_tokens_with_kv"),
        token_ids=chain.from_iterable(seq.scheduled_token_ids for seq in sequences),
        sampled=[index for index, seq in enumerate(sequences) if seq.is_sampled],
    )


def _prepare(
    sequences: Sequences[Sequence],
    is_prefill: bool,
    *,
    starts: np.ndarray,
    query_lens: np.ndarray,
    num_stored: np.ndarray,
    token_ids: Iterable[int],
    sampled: list[int],
) -> ModelInput:
    """query_lens tokens of each sequence from position starts on; those before num_stored are not stored again.

    Array operations over all sequences: at some hundreds of them, a loop would cost more than the GPU's step.
    """
    context_lens = starts + query_lens
    query_ends = np.cumsum(query_lens)
    num_tokens = int(query_ends[-1])
    row = np.repeat(np.arange(len(sequences)), query_lens)  # the sequence of each token
    positions = np.arange(num_tokens) + (context_lens - query_ends)[row]
    block_tables = _block_tables(sequences)
    is_tabled = not is_prefill or bool(starts.any())  # some sequence has cached keys
    return ModelInput(
        is_prefill=is_prefill,
        input_ids=np.fromiter(token_ids, np.int64, num_tokens),
        positions=positions,
        slot_mapping=_slots(block_tables, row, positions, num_stored, sequences[0].block_size),
        cu_seqlens_q=_running_sum(query_lens),
        cu_seqlens_k=_running_sum(context_lens),
        max_seqlen_q=int(query_lens.max()),
        max_seqlen_k=int(context_lens.max()),
        context_lens=context_lens.astype(np.int32),
        sequence_order=np.argsort(-context_lens, kind="stable").astype(np.int32),
        block_tables=block_tables if is_tabled else None,
        sample_indices=query_ends[sampled] - 1,
        sampling=prepare_sample([sequences[index] for index in sampled], context_lens[sampled]),
    )


def _slots(
    block_tables: np.ndarray, row: np.ndarray, positions: np.ndarray, num_stored: np.ndarray, block_size: int
) -> np.ndarray:
    """[num_tokens] int64: block * block_size + position % block_size; PADDING_SLOT for what is stored already.

    In warm-up, before there is a cache, sequences have no blocks, and nothing is stored.
    """
    if block_tables.shape[1] == 0:
        return np.full(len(positions), PADDING_SLOT, dtype=np.int64)
    blocks = block_tables[row, positions // block_size].astype(np.int64)
    return np.where(positions < num_stored[row], PADDING_SLOT, blocks * block_size + positions % block_size)


def prepare_sample(sequences: Sequences[Sequence], positions: np.ndarray) -> SamplingMetadata:
    """The SamplingMetadata of sequences that are sampled in this step, for the tokens that they get at `positions`."""
    params = [seq.sampling_params for seq in sequences]
    return SamplingMetadata(
        temperature=np.array([p.temperature for p in params], dtype=np.float32),
        top_k=np.array([p.top_k or 0 for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        seed=np.array([seq.seed for seq in sequences], dtype=np.uint64),
        position=positions,
    )


def _running_sum(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def _block_tables(sequences: Sequences[Sequence]) -> np.ndarray:
    num_blocks = np.fromiter((len(seq.block_table) for seq in sequences), np.int64, len(sequences))
    tables = np.full((len(sequences), num_blocks.max()), PADDING_BLOCK, dtype=np.int32)
    block_ids = chain.from_iterable(seq.block_table for seq in sequences)
    tables[np.arange(tables.shape[1]) < num_blocks[:, None]] = np.fromiter(block_ids, np.int32, num_blocks.sum())
    return tables
