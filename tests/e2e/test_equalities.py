"""One request, one answer: alone or in company, hit or miss, chunked, preempted, pickled, in blocks of any size.

Row by row (each token computed by the same operations on operands of the same shapes) tokens and logits are equal to
the last bit, whatever the way: so the engine adds nothing to them. What a matrix library adds by computing other shapes
together is bounded in test_engine_against_reference.py, and on a GPU in test_hugging_face.py and test_gpu_graphs.py.
"""

import functools
from typing import Any

import pytest
import torch

from nanovllm import LLM
from tests.support.counts import count_comparisons
from tests.support.row_by_row import row_by_row
from tests.support.serving import PROMPTS, Served, serve
from tests.support.tiny_models import tiny_model

ARCHITECTURES = ["qwen2", "qwen3_moe"]  # between them: biases, norms of heads, a mixture of experts


def preempt_every_third_step(llm: LLM, num_steps: int) -> None:
    if num_steps % 3 == 0 and llm.scheduler.running:
        llm.scheduler.preempt(llm.scheduler.running[-1])


steps_ahead: list[bool] = []  # of the engine that runs: whether a step was in flight after each


def num_steps_ahead(llm: LLM) -> int:
    number = sum(steps_ahead)
    steps_ahead.clear()
    return number


WAYS: dict[str, dict[str, Any]] = {
    "pickled": {"is_pickled": True},
    "one step ahead": {
        "async_scheduling": True,
        "after_step": lambda llm, num_steps: steps_ahead.append(llm._core._ahead is not None),
        "happens": num_steps_ahead,
    },
    "blocks of 1": {"kv_cache_block_size": 1, "num_kv_cache_blocks": 400},
    "blocks of 4": {"kv_cache_block_size": 4, "num_kv_cache_blocks": 100},
    "blocks of 64": {"kv_cache_block_size": 64},
    "in a batch": {},
    "all cached": {"times": 2, "happens": lambda llm: llm.scheduler.block_manager.num_hit_blocks},
    "in chunks": {"max_num_batched_tokens": 9, "happens": lambda llm: llm.scheduler.num_prefill_chunks},
    "preempted": {"after_step": preempt_every_third_step, "happens": lambda llm: llm.scheduler.num_preemptions},
}


@functools.cache
def alone(architecture: str) -> list[Served]:
    """Row by row, each prompt in an engine that has seen no other."""
    with row_by_row():
        return [served for prompt in PROMPTS for served in serve(tiny_model(architecture), [prompt])]


def assert_equal(ours: list[Served], theirs: list[Served]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.logits, other.logits), f"off by {(one.logits - other.logits).abs().max()}"
        count_comparisons("equalities: logits bit for bit against the prompt alone", one.logits.numel())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_by_row_every_way_gives_the_same_bits_as_alone(architecture: str, way: str) -> None:
    """D08 D14 D57 D58: tokens and logits, against each prompt prefilled whole in an engine of its own."""
    with row_by_row():
        assert_equal(serve(tiny_model(architecture), **WAYS[way]), alone(architecture))


def test_the_comparison_sees_one_bit() -> None:
    """The instrument's own test: the next float is not equal, and a way that does not happen is no comparison."""
    one = Served([1], torch.ones(1, 4))
    other = Served([1], torch.nextafter(torch.ones(1, 4), torch.tensor(2.0)))
    with pytest.raises(AssertionError, match="off by"):
        assert_equal([one], [other])
    with pytest.raises(AssertionError, match="did not happen"):
        serve(tiny_model("qwen2"), happens=lambda llm: llm.scheduler.num_preemptions)


# --- on a GPU ---

GPU_SETUPS = [
    ("triton", {"dtype": "float32", "kv_cache_block_size": 16}),
    ("triton", {"dtype": "bfloat16", "kv_cache_block_size": 16}),
    ("flash_attn", {"dtype": "bfloat16", "kv_cache_block_size": 256}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["pickled", "one step ahead"])
@pytest.mark.parametrize(("backend", "options"), GPU_SETUPS)
def test_ways_that_leave_the_shapes_alone_give_the_same_bits_on_a_gpu(
    backend: str, options: dict[str, Any], way: str
) -> None:
    """The arithmetic as it is: what crosses to a worker, and when, changes no operation."""
    model_dir = tiny_model("qwen3", head_dim=32, initializer_range=0.1, max_position_embeddings=512)
    options = {"device": "cuda", "attention_backend": backend, **options}
    assert_equal(serve(model_dir, **WAYS[way], **options), serve(model_dir, **options))
