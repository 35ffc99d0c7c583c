"""prepare_prefill and prepare_decode: by hand, against reference/, and against the definition for drawn sequences."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine import shared_prefix
from nanovllm.engine.model_input import (
    PLACEHOLDER_TOKEN,
    ModelInput,
    prepare_decode,
    prepare_decode_async,
    prepare_prefill,
    prepare_sample,
)
from nanovllm.engine.sequence import Sequence
from reference.packing import packing
from reference.slot_mapping import slot_mapping
from tests.support.counts import count_comparisons
from tests.support.scheduling import make_sequence


def scheduled(
    num_tokens: int, cached: int, chunk: int, blocks: list[int], block_size: int = 4, stored: int | None = None
) -> Sequence:
    """Tokens 100, 101, ...: token 100 + p stands at position p."""
    seq = make_sequence(list(range(100, 100 + num_tokens)), block_size)
    seq.block_table, seq.num_cached_tokens, seq.num_scheduled_tokens = blocks, cached, chunk
    seq.num_tokens_with_kv = cached if stored is None else stored
    return seq


def as_lists(value: ModelInput) -> dict[str, Any]:
    return {
        name: item.tolist() if isinstance(item, np.ndarray) else item
        for name, item in vars(value).items()
        if name != "sampling"
    }


def test_prefill_of_whole_prompts_by_hand() -> None:
    model_input = prepare_prefill([scheduled(3, 0, 3, [5]), scheduled(5, 0, 5, [2, 0])])
    assert as_lists(model_input) == {
        "is_prefill": True,
        "input_ids": [100, 101, 102, 100, 101, 102, 103, 104],
        "positions": [0, 1, 2, 0, 1, 2, 3, 4],
        "slot_mapping": [20, 21, 22, 8, 9, 10, 11, 0],
        "cu_seqlens_q": [0, 3, 8],
        "cu_seqlens_k": [0, 3, 8],
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
        "context_lens": [3, 5],
        "sequence_order": [1, 0],
        "block_tables": [[5, -1], [2, 0]],
        "reads_cache": False,
        "sample_indices": [0, 1],
        "input_ids_source": None,
        "shared_prefixes": None,
    }
    assert model_input.sampling.position.tolist() == [3, 5]


def test_sequences_of_equal_length_keep_their_order() -> None:
    lengths = [3] * 20 + [5] + [3] * 20
    model_input = prepare_prefill([scheduled(length, 0, length, [0, 1]) for length in lengths])
    assert model_input.sequence_order.tolist() == [20, *range(20), *range(21, 41)]


def test_a_first_decode_reads_the_cache() -> None:
    assert prepare_decode([scheduled(1, 0, 1, [3])]).reads_cache


def test_slots_beyond_2_31() -> None:
    """D52: a small model's cache on a large GPU."""
    block = 2**23 + 5
    assert prepare_decode([scheduled(3, 2, 1, [block], block_size=256)]).slot_mapping.tolist() == [block * 256 + 2]


@pytest.mark.parametrize("second_row", [[3, 8], [9, 8]])
def test_a_decode_step_names_the_prefixes_that_its_sequences_share(
    second_row: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", 1)
    sequences = [scheduled(6, 5, 1, [3, 7]), scheduled(7, 6, 1, second_row)]
    for prepare in (prepare_decode, partial(prepare_decode_async, sampled=sequences)):
        model_input = prepare(sequences, shares_prefixes=True)
        assert not model_input.is_prefill
        found = model_input.shared_prefixes
        assert (None if found is None else found.lens.tolist()) == ([4, 4] if second_row[0] == 3 else None)
        assert as_lists(replace(model_input, shared_prefixes=None)) == as_lists(prepare(sequences))
        assert prepare(sequences[:1], shares_prefixes=True).shared_prefixes is None
    assert prepare_decode_async(sequences, sampled=[]).input_ids_source is None


def test_a_token_that_is_not_known_yet_is_a_placeholder() -> None:
    known, sampled = scheduled(6, 4, 1, [3, 7]), scheduled(7, 6, 1, [5, 8])
    model_input = prepare_decode_async([known, sampled], sampled=[sampled])
    assert (model_input.input_ids.tolist(), model_input.input_ids_source.tolist()) == (
        [105, PLACEHOLDER_TOKEN],
        [-1, 0],
    )


def test_each_sampled_row_has_its_own_parameters() -> None:
    """D57. A seed has 64 bits."""
    metadata = prepare_sample(
        [
            make_sequence([1, 2], temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=2**64 - 1),
            make_sequence([1], temperature=2.0, seed=3),
        ],
        positions=np.array([2, 1]),
    )
    assert metadata.temperature.tolist() == [0.5, 2.0]
    assert metadata.top_k.tolist() == [7, 0]
    assert metadata.top_p.tolist() == [np.float32(0.9), 1.0]
    assert metadata.min_p.tolist() == [np.float32(0.1), 0.0]
    assert metadata.seed_low.tolist() == [2**32 - 1, 3]
    assert metadata.seed_high.tolist() == [2**32 - 1, 0]
    assert metadata.position.tolist() == [2, 1]


def test_dtypes_are_those_that_are_documented() -> None:
    int64 = ["input_ids", "positions", "slot_mapping", "sample_indices"]
    int32 = ["context_lens", "sequence_order", "block_tables", "cu_seqlens_q", "cu_seqlens_k"]
    model_input = prepare_prefill([scheduled(5, 2, 2, [0, 1]), scheduled(3, 0, 3, [2])])
    assert {getattr(model_input, name).dtype.name for name in int64} == {"int64"}
    assert {getattr(model_input, name).dtype.name for name in int32} == {"int32"}
    without_samples = prepare_prefill([scheduled(5, 0, 2, [0, 1])])
    for sampling in (model_input.sampling, without_samples.sampling):
        assert [array.dtype.name for array in vars(sampling).values()] == ["int64"] * 5 + ["float32"] * 3 + ["bool"]


@st.composite
def scheduled_sequences(draw: st.DrawFn, is_decode: bool) -> list[Sequence]:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        num_tokens = draw(st.integers(1, 20))
        cached = num_tokens - 1 if is_decode else draw(st.integers(0, num_tokens - 1))
        chunk = draw(st.integers(1, num_tokens - cached))
        blocks = draw(st.permutations(range(40)))[: -(-num_tokens // block_size)]
        is_stored = not is_decode and num_tokens % block_size == 0 and cached == num_tokens - 1 and draw(st.booleans())
        seq = scheduled(num_tokens, cached, chunk, blocks, block_size, stored=cached + is_stored)
        seq.token_ids = draw(st.lists(st.integers(0, 999), min_size=num_tokens, max_size=num_tokens))
        sequences.append(seq)
    return sequences


def check_definition(model_input: ModelInput, sequences: list[Sequence]) -> None:
    """Token by token: which sequence, position and slot each packed token has."""
    expected = []
    for row, seq in enumerate(sequences):
        for position in range(seq.num_cached_tokens, seq.num_cached_tokens + seq.num_scheduled_tokens):
            table = torch.tensor(seq.block_table)
            slot = int(slot_mapping(torch.tensor([position]), table, seq.block_size)[0])
            slot = -1 if position < seq.num_tokens_with_kv else slot
            expected.append((row, seq.token_ids[position], position, slot))
    rows = np.repeat(np.arange(len(sequences)), np.diff(model_input.cu_seqlens_q))
    actual = zip(rows, model_input.input_ids, model_input.positions, model_input.slot_mapping, strict=True)
    assert [tuple(int(item) for item in token) for token in actual] == expected
    count_comparisons("model input: tokens, positions and slots against the definition", len(expected))

    keys = [seq.token_ids[: seq.num_cached_tokens + seq.num_scheduled_tokens] for seq in sequences]
    assert model_input.cu_seqlens_k.tolist() == packing([torch.tensor(item) for item in keys])[1].tolist()
    assert model_input.context_lens.tolist() == [len(item) for item in keys]
    assert [len(keys[index]) for index in model_input.sequence_order] == sorted(map(len, keys), reverse=True)
    assert model_input.max_seqlen_k == max(map(len, keys))
    assert model_input.max_seqlen_q == max(seq.num_scheduled_tokens for seq in sequences)
    ends = [row for row, (seq, item) in enumerate(zip(sequences, keys, strict=True)) if len(item) == len(seq)]
    assert model_input.sample_indices.tolist() == ends
    assert model_input.sampling.position.tolist() == [len(sequences[row]) for row in ends]
    tables = [[int(block) for block in row if block != -1] for row in model_input.block_tables]
    assert tables == [seq.block_table for seq in sequences]
    has_cached_keys = any(seq.num_cached_tokens for seq in sequences)
    assert model_input.reads_cache == (has_cached_keys or not model_input.is_prefill)


@given(sequences=scheduled_sequences(is_decode=False))
def test_prefill_is_the_definition(sequences: list[Sequence]) -> None:
    """D07: the keys of a chunk end where the chunk ends."""
    check_definition(prepare_prefill(sequences), sequences)


@given(sequences=scheduled_sequences(is_decode=True))
def test_decode_is_the_definition(sequences: list[Sequence]) -> None:
    """D01: position len-1, slot block * block_size + (len-1) % block_size."""
    model_input = prepare_decode(sequences)
    assert not model_input.is_prefill
    check_definition(model_input, sequences)
