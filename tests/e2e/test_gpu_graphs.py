"""Decode and short prefills in CUDA graphs against eager steps and against float64, at every size of a graph."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS
from nanovllm.engine import model_input as model_input_module
from nanovllm.engine import shared_prefix
from nanovllm.engine.model_input import ModelInput, prepare_decode, prepare_prefill
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import to_device
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.prefill_graph import MAX_GRAPH_SEQS
from reference.checkpoint import load_checkpoint
from reference.transformer import transformer
from tests.e2e.conftest import tokens
from tests.support.counts import count_event
from tests.support.model_probe import make_runner
from tests.support.tiny_models import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.gpu

MAX_NUM_SEQS = 41  # captured: 1, 2, 4, 8, 16, 32 and 41
BLOCK_SIZE = 256  # FlashAttention's
SETUPS = [("triton", "float32"), ("triton", "bfloat16"), ("flash_attn", "bfloat16")]


@functools.cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(VOCAB_SIZE, (3 + 7 * i % 50,), generator=generator).tolist() for i in range(MAX_NUM_SEQS)]


@functools.cache
def exact_logits(model_dir: Path) -> torch.Tensor:
    """float64, after the last token of each prompt."""
    checkpoint = load_checkpoint(model_dir, torch.float64)
    return torch.stack([transformer(prompt, *checkpoint)[-1] for prompt in prompts()])


def prefilled_sequences(runner: ModelRunner) -> list[Sequence]:
    """All but the last token of each prompt stands in the cache; sequence i owns block i, so block 0 is in use."""
    sequences = []
    for index, prompt in enumerate(prompts()):
        seq = Sequence(prompt, SamplingParams.greedy(), block_size=BLOCK_SIZE)
        seq.block_table = [index]
        seq.num_scheduled_tokens = len(prompt) - 1
        sequences.append(seq)
    runner.run_model(prepare_prefill(sequences))
    for seq in sequences:
        seq.num_cached_tokens = seq.num_tokens_with_kv = len(seq) - 1
        seq.num_scheduled_tokens = 1
    return sequences


@torch.inference_mode()
def eager_logits(runner: ModelRunner, model_input: ModelInput) -> torch.Tensor:
    logits = runner.model.compute_logits(runner.run_model(model_input))
    assert logits is not None
    return logits.double().cpu()


@torch.inference_mode()
def graph_logits(runner: ModelRunner, model_input: ModelInput) -> torch.Tensor:
    assert runner.graphs is not None
    assert runner.graphs.can_replay(model_input)
    output = runner.graphs.replay(model_input)
    count_event("graph replay")
    assert output is not None
    logits, token_ids = output
    assert torch.equal(token_ids, runner.sampler(logits, to_device(model_input.sampling, logits.device)))
    return logits.double().cpu()


@pytest.mark.parametrize(("backend", "dtype"), SETUPS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_moe"])
def test_graph_and_eager_agree_at_every_batch_size(architecture: str, backend: str, dtype: str) -> None:
    """D40 D41 D57: wide batches, narrow, wide again; no further from float64 than twice eager, plus an ulp."""
    model_dir = tiny_model(architecture, head_dim=32, initializer_range=0.1)
    runner = make_runner(
        model_dir, device="cuda", dtype=dtype, attention_backend=backend, max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=4096, max_model_len=512, num_kv_cache_blocks=MAX_NUM_SEQS + 3,
    )  # fmt: skip
    assert runner.graphs is not None
    runner.kv_cache.fill_(torch.nan)  # what was never written must not be read, nor written by padding rows
    sequences = prefilled_sequences(runner)
    exact = exact_logits(model_dir)
    ulp = torch.finfo(getattr(torch, dtype)).eps * exact.abs().max()
    for size in (*range(MAX_NUM_SEQS, 0, -1), *range(1, MAX_NUM_SEQS + 1)):
        model_input = prepare_decode(sequences[:size])
        from_graph, from_eager = graph_logits(runner, model_input), eager_logits(runner, model_input)
        error, eager_error = ((logits - exact[:size]).norm() for logits in (from_graph, from_eager))
        assert error <= 2 * eager_error + ulp * size**0.5, f"batch of {size}"
    is_written = ~runner.kv_cache.isnan().any(dim=-1).any(dim=-1)  # [2, layers, blocks, block_size]
    for block, prompt in enumerate(prompts()):
        assert is_written[:, :, block, : len(prompt)].all()
        assert not is_written[:, :, block, len(prompt) :].any()
    assert not is_written[:, :, MAX_NUM_SEQS:].any()
    runner.close()


@pytest.mark.parametrize(("backend", "dtype"), SETUPS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_moe"])
@torch.inference_mode()
def test_graph_and_eager_agree_in_short_prefills(architecture: str, backend: str, dtype: str) -> None:
    """New prompts and ends of cached ones; wide, narrow, wide again; no further from float64 than eager, as above."""
    model_dir = tiny_model(architecture, head_dim=64, initializer_range=0.1)  # a head_dim with a kernel for Hopper GPUs
    runner = make_runner(
        model_dir, device="cuda", dtype=dtype, attention_backend=backend, max_model_len=512,
        num_kv_cache_blocks=MAX_GRAPH_SEQS + 1, kv_cache_block_size=BLOCK_SIZE,
    )  # fmt: skip
    graphs = runner.prefill_graphs
    assert graphs is not None
    exact = exact_logits(model_dir)
    ulp = torch.finfo(getattr(torch, dtype)).eps * exact.abs().max()
    cached_parts = [0.0, 0.5, 0.9]
    sizes = (MAX_GRAPH_SEQS, 1, 2, 5, 3, MAX_GRAPH_SEQS)
    for num_seqs, cached_part in itertools.product(sizes, cached_parts):
        runner.kv_cache.fill_(torch.nan)
        sequences = []
        for index, prompt in enumerate(prompts()[:num_seqs]):
            seq = Sequence(prompt, SamplingParams.greedy(), block_size=BLOCK_SIZE)
            seq.block_table = [index]
            seq.num_scheduled_tokens = int(cached_part * len(prompt)) if index % 3 else 0
            sequences.append(seq)
        if cached := [seq for seq in sequences if seq.num_scheduled_tokens]:
            runner.run_model(prepare_prefill(cached))
        for seq in sequences:
            seq.num_cached_tokens = seq.num_tokens_with_kv = seq.num_scheduled_tokens
            seq.num_scheduled_tokens = len(seq) - seq.num_cached_tokens
        model_input = prepare_prefill(sequences)
        assert graphs.can_replay(model_input)
        from_graph = graphs.replay(model_input)
        count_event("prefill graph replay")
        assert from_graph is not None
        is_written = ~runner.kv_cache.isnan().any(dim=-1).any(dim=-1)
        for seq in sequences:
            assert is_written[:, :, seq.block_table[0]].sum(dim=-1).eq(len(seq)).all()
        assert is_written.sum() == 2 * len(runner.kv_cache[0]) * sum(map(len, sequences)), "padding stored something"
        last_tokens = torch.as_tensor(model_input.cu_seqlens_q[1:] - 1, device="cuda").long()
        from_eager = runner.model.compute_logits(runner.run_model(model_input, None, last_tokens))
        assert from_eager is not None
        error, eager_error = ((x.double().cpu() - exact[:num_seqs]).norm() for x in (from_graph, from_eager))
        assert error <= 2 * eager_error + ulp * num_seqs**0.5, (num_seqs, cached_part)
    runner.close()


@pytest.mark.parametrize(("backend", "dtype"), SETUPS)
def test_graphs_change_no_token(backend: str, dtype: str) -> None:
    """More prompts than graphs have rows, finishing at different steps: batches shrink through all sizes."""
    params = [SamplingParams.greedy(max_tokens=4 + 2 * index) for index in range(len(DEMO_PROMPTS))]

    def generated(enforce_eager: bool) -> list[list[int]]:
        with LLM(
            str(bundled_model_path()), device="cuda", dtype=dtype, attention_backend=backend, max_model_len=512,
            max_num_seqs=20, enforce_eager=enforce_eager, num_kv_cache_blocks=48,
        ) as llm:  # fmt: skip
            assert (llm._core.executor._runner.graphs is None) is enforce_eager
            return tokens(llm, list(DEMO_PROMPTS), params)

    assert generated(enforce_eager=False) == generated(enforce_eager=True)


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_reading_a_shared_prefix_once_changes_no_token(enforce_eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prefixes, one of them of a single sequence, in batches that shrink."""
    prefixes = [[3 + (7 * position + index) % 400 for position in range(200 + index)] for index in range(3)]
    prompts = [prefixes[0 if index == 9 else 1 + index % 2] + [5 + index] * (1 + index % 20) for index in range(50)]
    params = [SamplingParams.greedy(max_tokens=3 + index % 30, ignore_eos=True) for index in range(50)]

    def generated(min_saved_tokens: int) -> list[list[int]]:
        monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", min_saved_tokens)
        with LLM(
            str(bundled_model_path()), device="cuda", dtype="float32", attention_backend="triton", max_model_len=512,
            max_num_seqs=48, kv_cache_block_size=16, num_kv_cache_blocks=2000, enforce_eager=enforce_eager,
        ) as llm:  # fmt: skip
            tokens(llm, [[*prefix, 9] for prefix in prefixes], SamplingParams.greedy(max_tokens=1))  # into the cache
            return tokens(llm, prompts, params)

    found: list[bool] = []
    find = shared_prefix.find_shared_prefixes

    def noting(*arguments: Any) -> Any:
        prefixes_of_step = find(*arguments)
        found.append(prefixes_of_step is not None)
        return prefixes_of_step

    monkeypatch.setattr(model_input_module, "find_shared_prefixes", noting)
    shared = generated(1)
    assert any(found)
    assert shared == generated(10**9)


@pytest.mark.whole_gpu
def test_graph_memory_is_reserved() -> None:
    """D42: graphs and cache together stay within the share of memory that was asked for, but for the context."""
    free, total = torch.cuda.mem_get_info()
    share = 1 - free / total + 0.1
    with LLM(
        str(bundled_model_path()), device="cuda", attention_backend="triton", max_model_len=2048, max_num_seqs=256,
        gpu_memory_utilization=share,
    ) as llm:  # fmt: skip
        free, total = torch.cuda.mem_get_info()
        assert total - free <= (share + 0.005) * total
        assert llm._core.executor._runner.graphs is not None
