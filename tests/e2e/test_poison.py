"""Poison: forced preemptions under it change nothing, and planted faults are caught at their step, by name."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.engine.model_input import PADDING_BLOCK, ModelInput
from nanovllm.engine.sequence import FinishCause, Sequence
from tests.support.engine_events import assert_occurred, scheduler_events
from tests.support.oracle import Oracle
from tests.support.poison import PoisonedEmpty, PoisonError, poisoned_llm
from tests.support.tiny_models import tiny_model

GREEDY = SamplingParams.greedy(max_tokens=12, ignore_eos=True)
PROMPT = [7, 3, 9, 9, 2]
OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch",
    "max_model_len": 40,
    "kv_cache_block_size": 4,
    "num_kv_cache_blocks": 12,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
}


@pytest.fixture
def llm() -> Iterator[LLM]:
    with poisoned_llm(tiny_model("qwen3"), **OPTIONS) as llm:
        yield llm


def run(llm: LLM, max_steps: int = 200) -> dict[int, list[int]]:
    outputs = {}
    for _ in range(max_steps):
        outputs.update({output["seq_id"]: output["token_ids"] for output in llm.step().finished})
        if llm.is_finished():
            return outputs
    raise AssertionError(f"not finished after {max_steps} steps")


def is_poisoned(llm: LLM, block_id: int) -> bool:
    return bool(llm._core.executor._runner.kv_cache[:, :, block_id].isnan().all())


# --- what is poisoned, and when ---


def test_blocks_that_were_never_written_are_nan(llm: LLM) -> None:
    llm.add_request(PROMPT, GREEDY)
    llm.step()
    written = llm._core.executor._runner.kv_cache.isfinite().all(dim=-1).all(dim=-1)  # [2, layers, blocks, block_size]
    (seq,) = llm.scheduler.running
    first, second = seq.block_table
    assert written[:, :, first].all()
    assert written[:, :, second].tolist() == [[[True, False, False, False]] * 2] * 2
    assert written.sum() == 2 * 2 * len(PROMPT)


@pytest.mark.parametrize("end", ["finish", "abort", "preempt"])
def test_a_freed_block_is_nan_at_once_unless_the_prefix_cache_keeps_it(llm: LLM, end: str) -> None:
    """5 tokens and one sampled: the first block is full and stays hittable, the second is lost. Preemption too."""
    seq_id = llm.add_request(PROMPT, GREEDY)
    llm.step()
    (seq,) = llm.scheduler.running
    full, partial = seq.block_table
    assert not is_poisoned(llm, partial)
    if end == "preempt":
        llm.scheduler.preempt(seq)
    elif end == "abort":
        llm.abort(seq_id)
    else:
        llm.scheduler.finish(seq, FinishCause.STOP_STRING)
    assert is_poisoned(llm, partial)
    assert torch.isfinite(llm._core.executor._runner.kv_cache[:, :, full]).all()
    llm.abort(seq_id)
    llm.step()


def test_an_evicted_block_is_nan_from_then_on(llm: LLM) -> None:
    manager = llm.scheduler.block_manager
    llm.generate([PROMPT], SamplingParams.greedy(max_tokens=1), use_tqdm=False)
    (kept,) = [block.block_id for block in manager.blocks if block.is_cached]
    seq = Sequence(list(range(100, 148)), block_size=4)  # takes the whole pool
    manager.allocate(seq)
    assert kept in seq.block_table
    assert is_poisoned(llm, kept)
    manager.deallocate(seq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8])
def test_uninitialised_tensors_are_no_numbers(dtype: torch.dtype) -> None:
    like = torch.zeros(3, dtype=dtype)
    with PoisonedEmpty():
        tensors = [torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3), torch.zeros(3, dtype=dtype)]
    for tensor in tensors[:-1]:
        assert (tensor.isnan() if dtype.is_floating_point else tensor == torch.iinfo(dtype).max).all()
    assert (tensors[-1] == 0).all()


# --- a run in which nothing may be read that is stale ---


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_preemptions_at_any_moment_change_no_token(architecture: str) -> None:
    """D08, D53: at every third step or so the last running sequence loses its blocks, which are poisoned."""
    rng = random.Random(random.getrandbits(32))  # NANOVLLM_TEST_SEED decides
    oracle = Oracle(tiny_model(architecture), 40)
    prompts = [PROMPT[: 1 + index % 5] * (1 + index % 3) for index in range(12)]
    with poisoned_llm(oracle.model_dir, **OPTIONS) as llm:
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        outputs: dict[int, list[int]] = {}
        num_steps = 0
        while not llm.is_finished():
            outputs.update({output["seq_id"]: output["token_ids"] for output in llm.step().finished})
            num_steps += 1
            if llm.scheduler.running and (rng.random() < 0.3 or num_steps == 2) and num_steps < 500:
                llm.scheduler.preempt(llm.scheduler.running[-1])
        assert_occurred(scheduler_events(llm.scheduler), ["preemption"])
    for seq_id, prompt in zip(ids, prompts, strict=True):
        oracle.check(prompt, GREEDY, 0, outputs[seq_id], "length")
    assert oracle.num_excused <= 1


# --- planted faults ---


def change_decode(llm: LLM, monkeypatch: pytest.MonkeyPatch, change: Callable[[ModelInput], dict[str, Any]]) -> None:
    runner = llm._core.executor._runner
    prepare = runner.prepare_decode

    def faulty(sequences: Any) -> ModelInput:
        model_input = prepare(sequences)
        return replace(model_input, **change(model_input))

    monkeypatch.setattr(runner, "prepare_decode", faulty)


def test_a_context_one_token_too_long_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step writes position 5, and reads up to position 6."""
    change_decode(
        llm,
        monkeypatch,
        lambda x: {"context_lens": x.context_lens + 1, "max_seqlen_k": x.max_seqlen_k + 1},
    )
    llm.add_request(PROMPT, GREEDY)
    llm.step()
    block = llm.scheduler.running[0].block_table[1]
    words = rf"step 2 \(decode\): sequence 0 read NaN: position 6 in block {block}, slot 2, taken by sequence 0 after"
    with pytest.raises(PoisonError, match=words):
        llm.step()


def test_a_block_table_from_the_step_before_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks the block that was opened for position 8, in the fifth step: its padding names a block of NaN."""
    last: list[np.ndarray] = []

    def stale(model_input: ModelInput) -> dict[str, Any]:
        tables = model_input.block_tables
        assert tables is not None
        last.append(tables)
        before = last[-2] if len(last) > 1 else tables
        padding = [(0, 0), (0, tables.shape[1] - before.shape[1])]
        return {"block_tables": np.pad(before, padding, constant_values=PADDING_BLOCK)}

    change_decode(llm, monkeypatch, stale)
    llm.add_request(PROMPT, GREEDY)
    for _ in range(4):
        llm.step()
    with pytest.raises(PoisonError, match=r"step 5 .* sequence 0 .* position 8 in block \d+, slot 0, never written"):
        llm.step()


def test_a_slot_one_too_far_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """D01: position 5 was stored at 6, and is read at 5."""
    change_decode(llm, monkeypatch, lambda x: {"slot_mapping": x.slot_mapping + 1})
    llm.add_request(PROMPT, GREEDY)
    llm.step()
    with pytest.raises(PoisonError, match=r"step 2 .* sequence 0 .* position 5 in block \d+, slot 1"):
        llm.step()


def test_a_block_freed_while_it_is_read_is_named(llm: LLM) -> None:
    """A lost reference count: the table still has it."""
    llm.add_request(PROMPT, GREEDY)
    llm.step()
    (seq,) = llm.scheduler.running
    table, counters = list(seq.block_table), (seq.num_cached_tokens, seq.num_tokens_with_kv)
    llm.scheduler.block_manager.deallocate(seq)
    seq.block_table, (seq.num_cached_tokens, seq.num_tokens_with_kv) = table, counters
    with pytest.raises(
        PoisonError, match=rf"step 2 .* position 4 in block {table[1]}, slot 0, freed by sequence 0 after step 1"
    ):
        llm.step()


def test_a_hit_on_blocks_that_were_not_computed_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole prompt, of three chunks, becomes hittable with its first chunk."""
    manager = llm.scheduler.block_manager
    cache = manager.cache_full_blocks

    def too_early(seq: Sequence) -> None:
        num_stored, seq.num_tokens_with_kv = seq.num_tokens_with_kv, len(seq)
        cache(seq)
        seq.num_tokens_with_kv = num_stored

    monkeypatch.setattr(manager, "cache_full_blocks", too_early)
    prompt = list(range(30, 50))
    llm.add_request(prompt, GREEDY)
    llm.step()
    first = list(llm.scheduler.running[0].block_table)
    llm.abort(0)
    llm.add_request([*prompt, 1], GREEDY)
    with pytest.raises(PoisonError, match=rf"step 2 \(prefill\): sequence 1 .* position 8 in block {first[2]}, slot 0"):
        llm.step()


def test_an_output_left_unwritten_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last query of every sequence of the prefill is never computed."""

    def without_last(self: Any, query: torch.Tensor, *others: Any) -> torch.Tensor:
        output = torch.empty_like(query)
        output[:-1] = query[:-1]
        return output

    monkeypatch.setattr(TorchAttentionBackend, "prefill", without_last)
    llm.add_request([3], GREEDY)
    llm.add_request(PROMPT, GREEDY)
    with pytest.raises(PoisonError, match=r"step 1 \(prefill\): sequence 1 .* an output left unwritten"):
        llm.step()


def test_a_token_that_was_never_sampled_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_the_last_out(logits: torch.Tensor, rows: Any) -> torch.Tensor:
        token_ids = torch.empty(len(logits), dtype=torch.int64)
        token_ids[:-1] = 0
        return token_ids

    monkeypatch.setattr(llm._core.executor._runner, "sampler", leaves_the_last_out)
    llm.add_request(PROMPT, GREEDY)
    with pytest.raises(PoisonError, match=f"step 1: sequence 0 got {2**63 - 1}, which is no token"):
        llm.step()


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize(("backend", "dtype"), [("triton", "float32"), ("flash_attn", "bfloat16")])
def test_gpu_steps_read_nothing_stale(backend: str, dtype: str, enforce_eager: bool) -> None:
    """D53: blocks, torch.empty and the rows that pad a graph's batch are poisoned; batches shrink through all sizes."""
    prompts = [[*PROMPT, index] * (1 + index % 4) for index in range(11)]
    params = [SamplingParams.greedy(max_tokens=3 + 2 * index, ignore_eos=True) for index in range(11)]
    options = {
        "device": "cuda", "dtype": dtype, "attention_backend": backend, "max_model_len": 512, "max_num_seqs": 11,
        "max_num_batched_tokens": 64, "num_kv_cache_blocks": 30, "enforce_eager": enforce_eager,
    }  # fmt: skip
    model_dir = tiny_model("qwen3", head_dim=32, initializer_range=0.1)
    with poisoned_llm(model_dir, **options) as llm:
        poisoned = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(str(model_dir), **options) as llm:
        assert [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)] == poisoned
