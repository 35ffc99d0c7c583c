"""Poison catches planted faults at their step, by name; and steps on a GPU read nothing stale.

tests/e2e/test_engine_against_reference.py runs the engine under poison.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.engine.model_input import PADDING_BLOCK, ModelInput
from nanovllm.engine.sequence import FinishCause
from tests.e2e.conftest import run_to_end, tokens
from tests.support.poison import PoisonError, poisoned_llm
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


@pytest.mark.parametrize("end", ["finish", "abort", "preempt"])
def test_blocks_are_nan_before_they_are_written_and_when_they_are_freed(llm: LLM, end: str) -> None:
    """Five tokens: the first block is full and stays in the prefix cache, the second is not kept."""
    llm.add_request(PROMPT, GREEDY)
    llm.step()
    (seq,) = llm.scheduler.running
    written = llm._core.executor._runner.kv_cache.isfinite().all(dim=-1).all(dim=-1)  # [2, layers, blocks, block_size]
    full, partial = seq.block_table
    assert written[:, :, full].all()
    assert written[:, :, partial].tolist() == [[[True, False, False, False]] * 2] * 2
    assert written.sum() == 2 * 2 * len(PROMPT)
    if end == "preempt":
        llm.scheduler.preempt(seq)
    elif end == "abort":
        llm.abort(seq.seq_id)
    else:
        llm.scheduler.finish(seq, FinishCause.STOP_STRING)
    assert llm._core.executor._runner.kv_cache[:, :, partial].isnan().all()
    assert llm._core.executor._runner.kv_cache[:, :, full].isfinite().all()


# --- planted faults ---


def context_one_too_long(x: ModelInput, before: ModelInput) -> dict[str, Any]:
    return {"context_lens": x.context_lens + 1, "max_seqlen_k": x.max_seqlen_k + 1}


def block_table_of_the_step_before(x: ModelInput, before: ModelInput) -> dict[str, Any]:
    """It lacks the block that was opened for position 8: its padding names a block of NaN."""
    padding = [(0, 0), (0, x.block_tables.shape[1] - before.block_tables.shape[1])]
    return {"block_tables": np.pad(before.block_tables, padding, constant_values=PADDING_BLOCK)}


def slot_one_too_far(x: ModelInput, before: ModelInput) -> dict[str, Any]:
    return {"slot_mapping": x.slot_mapping + 1}


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (context_one_too_long, 2),
        (block_table_of_the_step_before, 5),
        (slot_one_too_far, 2),
    ],
)
def test_a_wrong_model_input_is_named(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[ModelInput, ModelInput], dict[str, Any]],
    step: int,
) -> None:
    """D01, D53."""
    runner = llm._core.executor._runner
    prepare, inputs = runner.prepare_decode, []

    def faulty(*args: Any) -> ModelInput:
        inputs.append(prepare(*args))
        return replace(inputs[-1], **fault(inputs[-1], inputs[max(0, len(inputs) - 2)]))

    monkeypatch.setattr(runner, "prepare_decode", faulty)
    llm.add_request(PROMPT, GREEDY)
    with pytest.raises(PoisonError, match=rf"step {step} \(decode\): sequence 0 .* read NaN"):
        run_to_end(llm)


def test_an_output_left_unwritten_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last query of the prefill is never computed."""

    def without_last(self: Any, query: torch.Tensor, *others: Any) -> torch.Tensor:
        output = torch.empty_like(query)
        output[:-1] = query[:-1]
        return output

    monkeypatch.setattr(TorchAttentionBackend, "prefill", without_last)
    llm.add_request([3], GREEDY)
    llm.add_request(PROMPT, GREEDY)
    with pytest.raises(PoisonError, match=r"step 1 \(prefill\): sequence 1 .* an output was left"):
        llm.step()


def test_a_token_that_was_never_sampled_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._core.executor._runner, "sampler", lambda logits, rows: torch.empty(1, dtype=torch.int64))
    llm.add_request(PROMPT, GREEDY)
    with pytest.raises(PoisonError, match=f"step 1: sequence 0 got {2**63 - 1}, which is no token"):
        llm.step()


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
        poisoned = tokens(llm, prompts, params)
    with LLM(str(model_dir), **options) as llm:
        assert tokens(llm, prompts, params) == poisoned
