"""Sequence: its counters, and what is left of it after pickling."""

import pickle
from itertools import chain
from typing import Any

import pytest

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_input import prepare_decode_async
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams
from tests.support.scheduling import make_scheduler, make_sequence, step


def sent(seq: Sequence) -> Sequence:
    return pickle.loads(pickle.dumps(seq))


def decoding(seq_id: int, num_tokens: int) -> Sequence:
    """A sequence of blocks of 256, about to decode its last token."""
    seq = make_sequence(list(range(num_tokens)), 256, seq_id=seq_id, seed=2**63 + seq_id, temperature=0.7)
    seq.block_table = [7 * block + seq_id for block in range(seq.num_blocks)]
    seq.num_cached_tokens = seq.num_tokens_with_kv = num_tokens - 1
    seq.num_scheduled_tokens = 1
    return seq


def test_a_new_sequence_waits_with_nothing_computed() -> None:
    prompt = [5, 6, 7]
    seq = Sequence(prompt)
    assert (len(seq), seq.num_prompt_tokens, seq.num_completion_tokens, seq.num_uncached_tokens) == (3, 3, 0, 3)
    assert (seq.status, seq.block_table, seq.block_size) == (SequenceStatus.WAITING, [], 256)
    assert seq.sampling_params == SamplingParams()
    assert (seq.seq_id, seq.seed, seq.num_tokens_with_kv, seq.num_scheduled_tokens) == (0, 0, 0, 0)
    assert not seq.is_finished
    seq.append_token(3)
    assert (prompt, seq.prompt_token_ids, seq.completion_token_ids, seq.last_token) == ([5, 6, 7], [5, 6, 7], [3], 3)


def test_an_empty_sequence_is_refused() -> None:
    """D12."""
    with pytest.raises(ValueError, match=r"^token_ids must hold at least one token, got none$"):
        Sequence([])


@pytest.mark.parametrize(
    ("block_size", "num_tokens", "num_blocks"),
    [(1, 1, 1), (1, 3, 3), (2, 1, 1), (2, 2, 1), (2, 3, 2), (256, 256, 1), (256, 257, 2)],
)
def test_num_blocks_at_block_borders(block_size: int, num_tokens: int, num_blocks: int) -> None:
    seq = make_sequence([*range(num_tokens)], block_size)
    assert seq.num_blocks == num_blocks
    blocks = [seq.block_token_ids(index) for index in range(num_blocks)]
    assert [*chain(*blocks)] == seq.token_ids
    assert {len(block) for block in blocks[:-1]} <= {block_size}


@pytest.mark.parametrize(
    ("cached", "scheduled", "tokens", "is_sampled", "is_decodable"),
    [
        (0, 5, [1, 2, 3, 4, 5], True, False),
        (0, 2, [1, 2], False, False),
        (2, 3, [3, 4, 5], True, False),
        (4, 1, [5], True, True),
        (4, 0, [], False, True),
    ],
)
def test_what_a_step_computes(
    cached: int, scheduled: int, tokens: list[int], is_sampled: bool, is_decodable: bool
) -> None:
    seq = make_sequence([1, 2, 3, 4, 5], 2)
    seq.num_cached_tokens, seq.num_scheduled_tokens = cached, scheduled
    for view in (seq, sent(seq), sent(sent(seq))):
        assert view.scheduled_token_ids == tokens
        assert (view.is_sampled, view.is_decodable) == (is_sampled, is_decodable)


def test_pickling_leaves_the_sender_as_it_was() -> None:
    """D03."""
    seq = decoding(1, 300)
    before = {name: list(value) if isinstance(value, list) else value for name, value in vars(seq).items()}
    pickle.dumps(seq)
    assert vars(seq) == before


def test_a_workers_copy_has_the_counters_blocks_and_parameters() -> None:
    seq = decoding(3, 300)
    copy = sent(seq)
    names = "seq_id block_size sampling_params seed num_prompt_tokens block_table num_cached_tokens num_tokens_with_kv"
    for name in [*names.split(), "num_scheduled_tokens", "num_blocks", "last_token"]:
        assert getattr(copy, name) == getattr(seq, name), name
    assert len(copy) == 300
    assert copy.token_ids == [299]
    assert (copy.status, copy.finish_reason) == (SequenceStatus.RUNNING, None)
    assert (copy.num_cached_prompt_tokens, copy.block_hashes) == (None, [])


def test_a_state_of_another_version_is_refused() -> None:
    state = decoding(3, 300).__getstate__()
    with pytest.raises(ValueError, match="zip"):
        Sequence.__new__(Sequence).__setstate__(state[1:])


def test_a_preempted_sequence_sends_all_that_it_computes_again() -> None:
    """D04: it has generated tokens, and still prefills from its first token."""
    scheduler = make_scheduler(num_blocks=8, block_size=2)
    seq = make_sequence([1, 2, 3], 2, max_tokens=9)
    scheduler.add(seq)
    step(scheduler)
    step(scheduler)
    scheduler.preempt(seq)
    scheduler.block_manager.blocks[0].token_ids = [0, 0]  # its cached block is no hit any more
    batch = scheduler.schedule()
    assert (batch.is_prefill, batch.num_scheduled_tokens, seq.num_completion_tokens) == (True, (5,), 2)
    assert sent(seq).scheduled_token_ids == seq.token_ids


def test_a_chunk_sends_the_last_token_too_which_a_step_ahead_computes() -> None:
    """The eighth prefill in a row leaves one prompt token, and the decode step behind it is sent before it has run."""
    scheduler = make_scheduler(num_blocks=9, block_size=2, max_num_batched_tokens=2)
    seq = make_sequence(list(range(17)), 2, max_tokens=1)
    scheduler.add(seq)
    for _ in range(7):
        scheduler.postprocess(scheduler.schedule(), [])
    batch = scheduler.schedule()
    ahead = scheduler.schedule_next_async(batch)
    assert ahead is not None
    assert (seq.scheduled_token_ids, batch.sampled_sequences, ahead.is_prefill) == ([14, 15], (), False)
    assert sent(seq).scheduled_token_ids == [14, 15]
    assert prepare_decode_async([sent(seq)], []).input_ids.tolist() == [16]


def test_a_decode_message_does_not_grow_with_the_text() -> None:
    """D31: of the tokens only the last is sent; the block table takes a few bytes a block."""
    short, long = decoding(0, 16), decoding(0, 16 + 100 * 256)
    growth = len(pickle.dumps(long)) - len(pickle.dumps(short))
    assert growth < 100 * 4
    assert len(pickle.dumps(short)) < 400
    assert len(pickle.dumps([decoding(seq_id, 4096) for seq_id in range(256)])) < 64 * 1024


def test_no_class_holds_state() -> None:
    """D21."""

    def mutable(owner: type) -> dict[str, Any]:
        return {name: value for name, value in vars(owner).items() if isinstance(value, (list, dict, set, int))}

    names = mutable(Sequence).keys() | mutable(BlockManager).keys()
    assert {name for name in names if not name.startswith("__")} == set()
