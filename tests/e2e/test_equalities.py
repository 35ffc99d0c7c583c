"""One request, one answer: alone or in company, hit or miss, chunked, preempted, pickled, in blocks of any size.

Two claims, and both are tested. Row by row (each token computed by the same operations on operands of the same shapes)
tokens and logits are equal to the last bit, whatever the way: so the engine adds nothing to them. With the arithmetic
as it is, what leaves the shapes of a step alone stays equal to the last bit; what changes them changes the order in
which a matrix library adds up, and stays within the rounding of float32.
"""

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from reference.checkpoint import load_checkpoint
from reference.transformer import transformer
from tests.support.counts import count_comparisons, record_error
from tests.support.oracle import ERROR_RATIO, Oracle
from tests.support.row_by_row import row_by_row
from tests.support.serving import PROMPTS, Served, Way, serve
from tests.support.tiny_models import VOCAB_SIZE, tiny_model

ARCHITECTURES = ["qwen2", "qwen3_moe"]  # between them: biases, norms of heads, a mixture of experts


def preempt_every_third_step(llm: LLM, num_steps: int) -> None:
    if num_steps % 3 == 0 and llm.scheduler.running:
        llm.scheduler.preempt(llm.scheduler.running[-1])


steps_ahead: list[bool] = []  # of the engine that runs: whether a step was in flight after each


def num_steps_ahead(llm: LLM) -> int:
    number = sum(steps_ahead)
    steps_ahead.clear()
    return number


ALONE = Way(is_alone=True)
IN_A_BATCH = Way()
SAME_SHAPES = {
    "pickled": Way(is_pickled=True),
    "one step ahead": Way(
        {"async_scheduling": True},
        after_step=lambda llm, num_steps: steps_ahead.append(llm._core._ahead is not None),
        happens=num_steps_ahead,
    ),
    "blocks of 1": Way({"kv_cache_block_size": 1, "num_kv_cache_blocks": 400}),
    "blocks of 4": Way({"kv_cache_block_size": 4, "num_kv_cache_blocks": 100}),
    "blocks of 64": Way({"kv_cache_block_size": 64}),
}
OTHER_SHAPES = {
    "in a batch": IN_A_BATCH,
    "in a batch, last first": Way(is_reversed=True),
    "one arrival a step": Way(is_staggered=True),
    "all cached": Way(is_repeated=True, happens=lambda llm: llm.scheduler.block_manager.num_hit_blocks),
    "in chunks": Way({"max_num_batched_tokens": 9}, happens=lambda llm: llm.scheduler.num_prefill_chunks),
    "preempted": Way(after_step=preempt_every_third_step, happens=lambda llm: llm.scheduler.num_preemptions),
}


@functools.cache
def served(architecture: str, way: str, is_row_by_row: bool) -> list[Served]:
    """Served once for all tests of this process."""
    with row_by_row() if is_row_by_row else nullcontext():
        return serve(tiny_model(architecture), {"alone": ALONE, **SAME_SHAPES, **OTHER_SHAPES}[way])


def assert_equal(ours: list[Served], theirs: list[Served]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.logits, other.logits), f"off by {(one.logits - other.logits).abs().max()}"
        count_comparisons("equalities: logits bit for bit against the prompt alone", one.logits.numel())


def assert_close(ours: list[Served], theirs: list[Served], bound: float, name: str) -> None:
    """Each of the two is within bound of the exact logits. They are compared as far as they continue the same text."""
    num_tokens = 0
    for one, other in zip(ours, theirs, strict=True):
        for step, (token, expected) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
            error = float((one.logits[step] - other.logits[step]).abs().max())
            assert error <= 2 * bound, f"logits of token {step} are off by {error}, allowed {2 * bound}"
            record_error(f"equalities: {name}", error, 2 * bound)
            num_tokens += 1
            if token != expected:
                margin = other.logits[step][expected] - other.logits[step][token]
                assert margin <= 2 * bound, f"token {step} is {token}, not {expected}, by a margin of {margin}"
                break
    count_comparisons("equalities: logits within rounding against the prompt alone", num_tokens)
    assert num_tokens >= 0.9 * sum(len(other.token_ids) for other in theirs), "too many near ties to show anything"


@functools.cache
def rounding(model_dir: Path, texts: tuple[tuple[int, ...], ...]) -> float:
    """The largest rounding error of float32 logits on these texts, computed with the reference model."""
    oracle = Oracle(model_dir)
    return max(
        float((transformer(text, *oracle.single) - transformer(text, *oracle.exact)).abs().max()) for text in texts
    )


def rounding_of(model_dir: Path, outputs: list[Served], prompts: list[list[int]] = PROMPTS) -> float:
    texts = tuple((*prompt, *one.token_ids) for prompt, one in zip(prompts, outputs, strict=True))
    return rounding(model_dir, texts)


@pytest.mark.parametrize("way", [*OTHER_SHAPES, *SAME_SHAPES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_by_row_every_way_gives_the_same_bits_as_alone(architecture: str, way: str) -> None:
    """D08 D14 D57 D58: tokens and logits, against each prompt prefilled whole in an engine of its own."""
    assert_equal(served(architecture, way, is_row_by_row=True), served(architecture, "alone", is_row_by_row=True))


@pytest.mark.parametrize("way", SAME_SHAPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ways_that_leave_the_shapes_alone_give_the_same_bits(architecture: str, way: str) -> None:
    """The arithmetic as it is: what crosses to a worker, and where keys lie, changes no operation."""
    assert_equal(served(architecture, way, False), served(architecture, "in a batch", False))


@pytest.mark.parametrize("way", OTHER_SHAPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ways_that_change_the_shapes_stay_within_rounding(architecture: str, way: str) -> None:
    """D58. Whether the bits differ is the matrix library's affair, so only the bound is claimed: each of the two is
    within ERROR_RATIO of the reference's own float32 error (see tests/support/oracle.py).
    """
    alone = served(architecture, "alone", False)
    bound = ERROR_RATIO * rounding_of(tiny_model(architecture), alone)
    assert_close(served(architecture, way, False), alone, bound, way)


def test_the_comparison_sees_one_bit() -> None:
    """The instrument's own test: the next float is not equal, and a way that does not happen is no comparison."""
    one = Served([1], torch.ones(1, 4))
    other = Served([1], torch.nextafter(torch.ones(1, 4), torch.tensor(2.0)))
    with pytest.raises(AssertionError, match="off by"):
        assert_equal([one], [other])
    with pytest.raises(AssertionError, match="did not happen"):
        serve(tiny_model("qwen2"), Way(happens=lambda llm: llm.scheduler.num_preemptions))


# --- on a GPU ---

GPU_SETUPS = [
    ("triton", {"dtype": "float32", "kv_cache_block_size": 16}),
    ("triton", {"dtype": "bfloat16", "kv_cache_block_size": 16}),
    ("flash_attn", {"dtype": "bfloat16", "kv_cache_block_size": 256}),
]
GPU_WAYS = {**OTHER_SHAPES, "blocks of 256": Way({"kv_cache_block_size": 256}), "eager": Way({"enforce_eager": True})}
GPU_SAME_SHAPES = {way: SAME_SHAPES[way] for way in ("pickled", "one step ahead")}


# For blocks of 256, of which one must be full to be found again. Of the seeds to 60, the two after whose prompts no two
# tokens are nearly as good.
LONG_PROMPTS = [
    torch.randint(VOCAB_SIZE, (270,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in (26, 56)
]
LONG_OPTIONS = {"max_model_len": 384, "max_num_batched_tokens": 4096}


def on_gpu(backend: str, options: dict[str, Any], way: Way, prompts: list[list[int]] = PROMPTS) -> list[Served]:
    return serve(gpu_model(), way, prompts, device="cuda", attention_backend=backend, **options)


def gpu_model() -> Path:
    return tiny_model("qwen3", head_dim=32, initializer_range=0.1, max_position_embeddings=512)


@pytest.mark.gpu
@pytest.mark.parametrize("way", GPU_SAME_SHAPES)
@pytest.mark.parametrize(("backend", "options"), GPU_SETUPS)
def test_ways_that_leave_the_shapes_alone_give_the_same_bits_on_a_gpu(
    backend: str, options: dict[str, Any], way: str
) -> None:
    assert_equal(on_gpu(backend, options, GPU_SAME_SHAPES[way]), on_gpu(backend, options, IN_A_BATCH))


@pytest.mark.gpu
@pytest.mark.parametrize("way", GPU_WAYS)
@pytest.mark.parametrize(("backend", "options"), GPU_SETUPS)
def test_ways_stay_within_rounding_on_a_gpu(backend: str, options: dict[str, Any], way: str) -> None:
    """Alone in CUDA graphs against each way, eager among them. bfloat16: twice plain PyTorch's error, and an ulp."""
    prompts = PROMPTS
    if GPU_WAYS[way].is_repeated and options["kv_cache_block_size"] == 256:
        prompts, options = LONG_PROMPTS, {**options, **LONG_OPTIONS}
    alone = on_gpu(backend, options, ALONE, prompts)
    if options["dtype"] == "float32":
        bound = ERROR_RATIO * rounding_of(gpu_model(), alone, prompts)
    else:
        texts = [[*prompt, *one.token_ids] for prompt, one in zip(prompts, alone, strict=True)]
        bound = max(map(bfloat16_bound, texts))
    ways = on_gpu(backend, options, GPU_WAYS[way], prompts)
    assert_close(ways, alone, bound, f"{way}, {backend}, {options['dtype']}")


def bfloat16_bound(text: list[int]) -> float:
    exact = transformer(text, *load_checkpoint(gpu_model(), torch.float64))
    plain = transformer(text, *load_checkpoint(gpu_model(), torch.bfloat16)).double()
    return float(2 * (plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max())
