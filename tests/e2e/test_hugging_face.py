"""The engine against transformers: logits of every variant of every architecture; greedy tokens through preemptions,
prefix hits and chunks at once, on a GPU eagerly and in graphs.

transformers runs on the CPU in float64, and in the engine's dtype: the two differ by what rounding does to this model
and these tokens. tests/support/hugging_face.py says how much more ours may differ.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.e2e.conftest import tokens
from tests.support.comparing import assert_within
from tests.support.engine_events import assert_occurred, scheduler_events
from tests.support.hugging_face import first_module_that_differs, hugging_face_logits, num_excused
from tests.support.model_probe import make_runner, teacher_forced_logits
from tests.support.oracle import ERROR_RATIO
from tests.support.tiny_models import ARCHITECTURES, VARIANTS, VOCAB_SIZE, random_tokens, tiny_model

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "attention_backend": "torch"}


def check_logits(model_dir: Path) -> None:
    """Every position of a prompt in two chunks and a continuation decoded token by token."""
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


@pytest.mark.parametrize("variant", [variant for _, variant in VARIANTS], ids=[name for name, _ in VARIANTS])
def test_teacher_forced_logits(variant: dict[str, Any]) -> None:
    """D01 D07 D64 D65 D66"""
    check_logits(tiny_model(**variant))


@pytest.mark.parametrize("module", ["embed_tokens", "layers.0.self_attn", "layers.1.mlp", "norm"])
def test_a_mismatch_names_the_first_module_that_differs(module: str) -> None:
    model_dir, token_ids = tiny_model("qwen3"), random_tokens(20, seed=2)
    runner = make_runner(model_dir, kv_cache_block_size=16, num_kv_cache_blocks=4, **OPTIONS)

    def with_a_fault(_: Any, arguments: Any, output: Any) -> Any:
        return (1.01 * output[0], *output[1:]) if isinstance(output, tuple) else 1.01 * output

    runner.model.model.get_submodule(module).register_forward_hook(with_a_fault)

    def compute() -> torch.Tensor:
        return teacher_forced_logits(runner, token_ids, chunks=[12], block_table=[2, 0])

    message = first_module_that_differs(model_dir, runner.model.model, compute, token_ids, ERROR_RATIO)
    assert message.startswith(f"the first module whose output differs is {module}, most at position ")


# --- preemptions, prefix hits and chunks at once ---

SETUPS = [("torch", "bfloat16"), ("triton", "float32"), ("triton", "bfloat16"), ("flash_attn", "bfloat16")]


def check_under_pressure(architecture: str, dtype: str, divisor: int = 1, **options: Any) -> None:
    """transformers, given our tokens, would have chosen each of them, but where its best logits are within rounding.

    Blocks of 256, FlashAttention's; too few for three sequences of up to four each. divisor: of all lengths.
    """
    model_dir = tiny_model(architecture, head_dim=32, initializer_range=0.1, max_position_embeddings=1024)
    generator = torch.Generator().manual_seed(6)
    lengths = (-(-length // divisor) for length in (300, 3, 17, 40))
    prefix, *tails = (torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths)
    prompts, max_tokens = [[*prefix, *tail] for tail in tails], 480 // divisor
    with LLM(
        str(model_dir), dtype=dtype, kv_cache_block_size=256 // divisor, num_kv_cache_blocks=5, max_num_seqs=3,
        max_num_batched_tokens=200 // divisor, max_model_len=1024 // divisor, **options,
    ) as llm:  # fmt: skip
        outputs = tokens(llm, prompts, SamplingParams.greedy(max_tokens=max_tokens, ignore_eos=True))
        assert_occurred(scheduler_events(llm.scheduler), ["preemption", "prefill chunk", "block hit"])
    for prompt, token_ids in zip(prompts, outputs, strict=True):
        assert len(token_ids) == max_tokens
        torch_dtype = getattr(torch, dtype)
        assert num_excused(model_dir, prompt, token_ids, torch_dtype, torch.float64) <= max_tokens // 10


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_bfloat16_under_pressure(architecture: str) -> None:
    check_under_pressure(architecture, "bfloat16", divisor=4, device="cpu", attention_backend="torch")


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize(("backend", "dtype"), SETUPS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_under_pressure_on_a_gpu(architecture: str, backend: str, dtype: str, enforce_eager: bool) -> None:
    check_under_pressure(architecture, dtype, device="cuda", attention_backend=backend, enforce_eager=enforce_eager)
