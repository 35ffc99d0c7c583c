"""Warm-up: the profiled step is the largest, and the warm-up prefills keep the limits and fit in the cache."""

import itertools
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.engine.model_input import PADDING_SLOT
from nanovllm.worker.warmup import LONG_CONTEXT, dummy_prefill, prefill_warmup_shapes, prepare_profile_run
from tests.support.model_probe import make_runner
from tests.support.tiny_models import tiny_model


@given(max_num_seqs=st.integers(1, 40), spare=st.integers(0, 60), max_model_len=st.integers(2, 50))
@example(max_num_seqs=3, spare=60, max_model_len=5)  # a larger budget than the sequences can use
def test_no_step_within_the_limits_is_larger_than_the_profiled_one(
    max_num_seqs: int, spare: int, max_model_len: int
) -> None:
    """D42: this also holds if the budget is not a multiple of max_model_len."""
    budget = max_num_seqs + spare
    model_input = prepare_profile_run(budget, max_model_len, max_num_seqs, block_size=16)
    num_tokens = min(budget, max_num_seqs * max_model_len)
    assert model_input.is_prefill
    assert len(model_input.input_ids) == model_input.cu_seqlens_q[-1] == num_tokens
    assert len(model_input.context_lens) <= max_num_seqs
    assert model_input.max_seqlen_q == min(budget, max_model_len)
    rows = (model_input.sample_indices, model_input.sampling.top_k, model_input.sampling.position)
    assert [len(row) for row in rows] == [max_num_seqs] * 3
    assert set(model_input.sample_indices) <= set(range(len(model_input.context_lens)))
    assert (model_input.sampling.top_k > 1).all()
    assert (model_input.sampling.top_p < 1).all()
    assert (model_input.sampling.min_p > 0).all()
    assert set(model_input.slot_mapping.tolist()) == {PADDING_SLOT}, "there is no cache yet"
    assert not model_input.reads_cache


@given(
    budget=st.integers(1, 5000),
    max_num_seqs=st.integers(1, 40),
    max_model_len=st.integers(2, 700),
    num_blocks=st.integers(1, 9),
    block_size=st.sampled_from([16, 256, 1024]),
)
@example(budget=8, max_num_seqs=4, max_model_len=512, num_blocks=3, block_size=256)  # just too short for LONG_CONTEXT
@example(budget=8, max_num_seqs=4, max_model_len=513, num_blocks=3, block_size=256)
@example(budget=8, max_num_seqs=4, max_model_len=513, num_blocks=2, block_size=256)  # just too few slots
@example(budget=700, max_num_seqs=40, max_model_len=5, num_blocks=1, block_size=4)  # fewer slots than max_model_len
def test_prefill_warmup_shapes_keep_the_limits_and_include_each_shape_that_fits(
    budget: int, max_num_seqs: int, max_model_len: int, num_blocks: int, block_size: int
) -> None:
    shapes = list(prefill_warmup_shapes(budget, max_model_len, max_num_seqs, num_blocks, block_size))
    max_context_len = min(max_model_len, num_blocks * block_size)
    for query_lens, num_cached_tokens in shapes:
        model_input = dummy_prefill(query_lens, num_cached_tokens, block_size)
        assert model_input.is_prefill
        assert (model_input.slot_mapping == PADDING_SLOT).all()
        assert model_input.block_tables.max() < num_blocks
        assert model_input.block_tables.shape[1] * block_size >= model_input.max_seqlen_k
        assert len(model_input.input_ids) == sum(query_lens) <= budget
        assert model_input.positions[0] == num_cached_tokens
        assert model_input.max_seqlen_k <= max_context_len
        assert len(model_input.sample_indices) == len(query_lens) <= max_num_seqs
        assert (model_input.sampling.top_k == 0).all()
    kinds = {(sum(query_lens), num_cached_tokens) for query_lens, num_cached_tokens in shapes}
    assert len(kinds) == len(shapes)
    for num_cached_tokens in (0, 1):
        for num_tokens in (2**power for power in range(13)):
            fits_in_one_sequence = num_tokens <= min(budget, max_context_len - num_cached_tokens)
            assert ((num_tokens, num_cached_tokens) in kinds) or not fits_in_one_sequence
    assert ((1, LONG_CONTEXT) in kinds) == (max_context_len > LONG_CONTEXT)


def test_a_large_prefill_has_several_sequences_and_comes_first() -> None:
    fresh, cached, *_, long = prefill_warmup_shapes(20000, 4096, 256, 100, 256)
    assert fresh == ([4096] * 4, 0)
    assert cached == ([4095] * 4 + [4], 1)
    assert long == ([1], LONG_CONTEXT)


def test_long_context_equals_the_minimum_of_keys_of_the_hopper_kernel() -> None:
    pytest.importorskip("triton")
    from nanovllm.kernels.varlen_attention import MIN_HOPPER_KEYS

    assert LONG_CONTEXT == MIN_HOPPER_KEYS


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_warm_up_runs_every_shape_and_does_not_write_to_the_cache(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs on the CPU. The cache is filled with NaN, which any write would replace."""
    limits = {"max_num_batched_tokens": 700, "max_model_len": 600, "max_num_seqs": 3}
    cache = {"num_kv_cache_blocks": 40, "kv_cache_block_size": 16}
    model_dir = tiny_model(architecture, max_position_embeddings=600)
    runner = make_runner(model_dir, device="cpu", attention_backend="torch", **limits, **cache)
    runner.kv_cache.fill_(torch.nan)
    execute = Mock(wraps=runner._execute)
    monkeypatch.setattr(runner, "_execute", execute)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    runner.warmup_model()
    assert runner.kv_cache.isnan().all()
    shapes = prefill_warmup_shapes(*limits.values(), *cache.values())
    executed = [call.args[0].cu_seqlens_q.tolist() for call in execute.call_args_list]
    assert executed == [[0, *itertools.accumulate(query_lens)] for query_lens, _ in shapes]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_compiling_runs_every_shape_in_one_layer_of_each_kind_and_leaves_the_model_as_it_was(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"max_num_batched_tokens": 90, "max_model_len": 60, "max_num_seqs": 70}
    model_dir = tiny_model(architecture, max_position_embeddings=60)
    runner = make_runner(
        model_dir, device="cpu", attention_backend="torch", max_num_seqs=70, max_num_batched_tokens=90,
        max_model_len=60, num_kv_cache_blocks=1, kv_cache_block_size=64,
    )  # fmt: skip
    layers = runner.model.model.layers
    runner.ops, runner.shares_prefixes = replace(runner.ops, compile_ahead=lambda run: run()), True
    runner.graph_sizes = runner._choose_graph_sizes()
    steps, num_layers = [], set()

    def execute(model_input):
        shared = model_input.shared_prefixes
        assert shared is None or (shared.order.dtype, shared.lens.dtype) == (np.int32, np.int32)
        steps.append((model_input.is_prefill, len(model_input.input_ids), shared is not None))
        num_layers.add(len(runner.model.model.layers))

    monkeypatch.setattr(runner, "_execute", execute)
    runner.compile_kernels()
    decodes = [(False, size, False) for size in (1, 2, 4, 8, 16, 32, 64, 70)]
    assert [step for step in steps if not step[0]] == [*decodes, (False, 64, True), (False, 70, True)]
    assert sum(is_prefill for is_prefill, *_ in steps) == 1 + len(list(prefill_warmup_shapes(*limits.values(), 1, 64)))
    assert num_layers == {1 + len({type(layer.mlp) for layer in list(layers)[1:]})}, "the first has no residual"
    assert runner.model.model.layers is layers
    assert len(layers) == runner.model_config.num_hidden_layers
    assert all(layer.kv_cache is None for layer in runner._attention_layers())
