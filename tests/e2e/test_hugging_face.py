"""The engine against transformers, on every variant of every architecture, in float32 on the CPU.

The bound: transformers is run in float64 and in float32. The two differ by what float32 rounding does to this model and
these tokens; our float32 logits may differ from float64 by ERROR_RATIO times that (see tests/support/oracle.py).
"""

from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS
from tests.support.comparing import assert_within
from tests.support.counts import count_comparisons
from tests.support.hugging_face import (
    check_greedy_choices,
    first_module_that_differs,
    hugging_face_logits,
    load_hugging_face,
)
from tests.support.model_probe import make_runner, teacher_forced_logits
from tests.support.oracle import ERROR_RATIO
from tests.support.tiny_models import VARIANTS, VOCAB_SIZE, tiny_model

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "attention_backend": "torch"}
variants = pytest.mark.parametrize("variant", [variant for _, variant in VARIANTS], ids=[name for name, _ in VARIANTS])


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@variants
def test_teacher_forced_logits(variant: dict[str, Any]) -> None:
    """D01 D07 D64 D65: every position of a prompt in two chunks and a continuation decoded token by token."""
    model_dir = tiny_model(**variant)
    token_ids = random_tokens(100, seed=1)
    exact = hugging_face_logits(model_dir, token_ids, torch.float64)
    rounding = (hugging_face_logits(model_dir, token_ids, torch.float32) - exact).abs().max()
    runner = make_runner(model_dir, kv_cache_block_size=16, num_kv_cache_blocks=9, **OPTIONS)

    def compute() -> torch.Tensor:
        return teacher_forced_logits(runner, token_ids, chunks=[33, 27], block_table=[5, 0, 8, 3, 1, 7, 2])

    ours, allowed = compute(), float(ERROR_RATIO * rounding)
    where = ""
    if not (ours.double() - exact).abs().max() <= allowed:
        where = first_module_that_differs(model_dir, runner.model.model, compute, token_ids, ERROR_RATIO)
    assert_within("engine: logits against transformers", ours, exact, allowed, where)


@pytest.mark.parametrize("module", ["embed_tokens", "layers.0.self_attn", "layers.1.mlp", "norm"])
def test_a_mismatch_names_the_first_module_that_differs(module: str) -> None:
    model_dir, token_ids = tiny_model("qwen3"), random_tokens(20, seed=2)
    runner = make_runner(model_dir, kv_cache_block_size=16, num_kv_cache_blocks=4, **OPTIONS)

    def with_a_fault(_: Any, arguments: Any, output: Any) -> Any:
        return (1.01 * output[0], *output[1:]) if isinstance(output, tuple) else 1.01 * output

    runner.model.model.get_submodule(module).register_forward_hook(with_a_fault)

    def compute() -> torch.Tensor:
        return teacher_forced_logits(runner, token_ids, chunks=[12], block_table=[2, 0])

    said = first_module_that_differs(model_dir, runner.model.model, compute, token_ids, ERROR_RATIO)
    assert said.startswith(f"the first module whose output differs is {module}, most at position ")


@variants
def test_greedy_continuations(variant: dict[str, Any]) -> None:
    """transformers, given our tokens, would have chosen each of them, but where its own two best are within
    rounding.
    """
    model_dir = tiny_model(**variant)
    prompts = [random_tokens(length, seed=length) for length in (1, 16, 37, 64)]
    with LLM(str(model_dir), kv_cache_block_size=16, num_kv_cache_blocks=40, max_num_batched_tokens=40, max_num_seqs=3,
             max_model_len=128, **OPTIONS) as llm:  # fmt: skip
        outputs = llm.generate(prompts, SamplingParams.greedy(max_tokens=24, ignore_eos=True), use_tqdm=False)
    num_excused = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        check = check_greedy_choices(model_dir, prompt, output["token_ids"], torch.float32)
        # each of two logits may be off by the bound
        assert check.shortfalls.max() <= 2 * ERROR_RATIO * check.rounding
        num_excused += int((check.shortfalls > 0).sum())
        count_comparisons("engine: greedy tokens against transformers' logits", len(output["token_ids"]))
    assert num_excused <= 1


def test_the_bundled_model_generates_what_transformers_generates() -> None:
    """Token for token: its margins are far above rounding, so nothing is excused."""
    model = load_hugging_face(bundled_model_path(), torch.float32)
    with LLM(str(bundled_model_path()), max_model_len=512, **OPTIONS) as llm:
        outputs = llm.generate(list(DEMO_PROMPTS), SamplingParams.greedy(max_tokens=48), use_tqdm=False)
        for prompt, output in zip(DEMO_PROMPTS, outputs, strict=True):
            inputs = torch.tensor([llm.tokenizer.encode(prompt)])
            generated = model.generate(inputs, max_new_tokens=48, do_sample=False)[0, inputs.shape[1] :]
            assert output["token_ids"] == generated.tolist()
            count_comparisons("engine: greedy tokens against transformers' generate", len(generated))
