"""Sequence: its initial state, and what pickling sends to a worker."""

import pickle
from types import FunctionType

import pytest

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_input import prepare_decode_async
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams
from tests.support.scheduling import make_scheduler, make_sequence


def sent(seq: Sequence) -> Sequence:
    return pickle.loads(pickle.dumps(seq))


def decoding(seq_id: int, num_tokens: int) -> Sequence:
    """A sequence in blocks of 256 tokens, of which the scheduled decode step computes the last token."""
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


def test_pickling_leaves_the_sender_as_it_was() -> None:
    """D03."""
    seq = decoding(1, 300)
    before = {name: list(value) if isinstance(value, list) else value for name, value in vars(seq).items()}
    pickle.dumps(seq)
    assert vars(seq) == before


def test_a_pickled_sequence_has_only_the_scheduled_tokens_and_no_state_of_the_scheduler() -> None:
    copy = sent(decoding(3, 300))
    assert (len(copy), copy.token_ids, copy.status, copy.finish_reason) == (300, [299], SequenceStatus.RUNNING, None)
    assert (copy.num_cached_prompt_tokens, copy.block_hashes) == (None, [])


def test_a_state_of_another_version_is_refused() -> None:
    state = decoding(3, 300).__getstate__()
    with pytest.raises(ValueError, match="zip"):
        Sequence.__new__(Sequence).__setstate__(state[1:])


def test_a_pickled_prefill_chunk_has_the_last_token_which_the_next_async_step_computes() -> None:
    """The eighth prefill in a row leaves one prompt token, which a decode step computes that is already submitted."""
    scheduler = make_scheduler(num_blocks=9, block_size=2, max_num_batched_tokens=2)
    seq = make_sequence(list(range(17)), 2, max_tokens=1)
    scheduler.add(seq)
    for _ in range(7):
        scheduler.postprocess(scheduler.schedule(), [])
    batch = scheduler.schedule()
    next_batch = scheduler.schedule_next_async(batch)
    assert next_batch is not None
    assert (seq.scheduled_token_ids, batch.sampled_sequences, next_batch.is_prefill) == ([14, 15], (), False)
    assert sent(seq).scheduled_token_ids == [14, 15]
    assert prepare_decode_async([sent(seq)], []).input_ids.tolist() == [16]


def test_a_decode_message_does_not_grow_with_the_text() -> None:
    """D31: of the tokens only the last is sent; the block table takes a few bytes a block."""
    short, long = decoding(0, 16), decoding(0, 16 + 100 * 256)
    growth = len(pickle.dumps(long)) - len(pickle.dumps(short))
    assert growth < 100 * 4
    assert len(pickle.dumps(short)) < 400
    assert len(pickle.dumps([decoding(seq_id, 4096) for seq_id in range(256)])) < 64 * 1024


@pytest.mark.parametrize("owner", [Sequence, BlockManager])
def test_a_class_holds_only_functions_and_tuples(owner: type) -> None:
    """D21: no block size, counter of ids or cache that two engines would share."""
    attributes = {name: value for name, value in vars(owner).items() if not name.startswith("__")}
    assert [name for name, value in attributes.items() if not isinstance(value, FunctionType | property | tuple)] == []
