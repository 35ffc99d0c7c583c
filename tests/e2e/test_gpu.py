"""The engine on a GPU, eager, with each attention backend, against reference/ on the CPU in float64; and its memory.

float32 (torch and triton): the same tokens. bfloat16: logits no further from float64 than twice what plain PyTorch
(the reference itself, run in bfloat16) is, plus one unit in the last place of the largest logit. The factor is
FlashAttention's own criterion: same dtype, another order of summation.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS
from reference.checkpoint import Checkpoint, load_checkpoint
from reference.transformer import transformer
from tests.e2e.conftest import tokens
from tests.support.comparing import assert_within
from tests.support.engine_events import assert_occurred, scheduler_events
from tests.support.model_probe import make_runner, teacher_forced_logits
from tests.support.oracle import ERROR_RATIO, Oracle
from tests.support.programs import run_python
from tests.support.tiny_models import ARCHITECTURES, random_tokens, tiny_model

pytestmark = pytest.mark.gpu

BACKENDS = ["torch", "flash_attn", "triton"]
EAGER: dict[str, Any] = {"device": "cuda", "enforce_eager": True}


@functools.cache
def checkpoint(model_dir: Path, dtype: torch.dtype) -> Checkpoint:
    return load_checkpoint(model_dir, dtype)


def model_for_flash_attention(architecture: str) -> Path:
    """head_dim 32: FlashAttention takes no smaller one. Weights as trained models have them, not made for float32."""
    return tiny_model(architecture, head_dim=32, initializer_range=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_logits_on_the_torch_backend(architecture: str) -> None:
    """No TF32 anywhere: the bound is that of the CPU."""
    model_dir = tiny_model(architecture)
    token_ids = random_tokens(100, seed=1)
    exact = transformer(token_ids, *checkpoint(model_dir, torch.float64))
    rounding = (transformer(token_ids, *checkpoint(model_dir, torch.float32)) - exact).abs().max()
    runner = make_runner(
        model_dir, dtype="float32", attention_backend="torch", kv_cache_block_size=16, num_kv_cache_blocks=9,
        max_num_seqs=8, max_num_batched_tokens=256, **EAGER,
    )  # fmt: skip
    ours = teacher_forced_logits(runner, token_ids, chunks=[33, 27], block_table=[5, 0, 8, 3, 1, 7, 2])
    assert_within("engine: logits on a GPU against the reference", ours, exact, float(ERROR_RATIO * rounding))


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_float64_checkpoint_is_computed_in_pytorch(architecture: str) -> None:
    """No kernel takes float64, so "auto" takes none and captures no graph. Float32 angles err by 1e-5 of logits."""
    model_dir = tiny_model(architecture, dtype="float64")
    token_ids = random_tokens(60, seed=1)
    exact = transformer(token_ids, *checkpoint(model_dir, torch.float64))
    runner = make_runner(
        model_dir, device="cuda", num_kv_cache_blocks=2, max_num_seqs=8, max_num_batched_tokens=256
    )  # fmt: skip
    assert (runner.dtype, runner.graphs) == (torch.float64, None)
    ours = teacher_forced_logits(runner, token_ids, chunks=[33], block_table=[1])
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_logits(architecture: str, backend: str) -> None:
    """Chunked prefill over a cached prefix, then decode, across a block border, in permuted blocks.

    Root mean square over positions: in a mixture of experts, rounding sends some tokens to another expert, theirs and
    ours.
    """
    model_dir = model_for_flash_attention(architecture)
    token_ids = random_tokens(300, seed=2)
    exact = transformer(token_ids, *checkpoint(model_dir, torch.float64))
    plain = transformer(token_ids, *checkpoint(model_dir, torch.bfloat16)).double()
    runner = make_runner(
        model_dir, dtype="bfloat16", attention_backend=backend, num_kv_cache_blocks=4, max_num_seqs=8,
        max_num_batched_tokens=512, **EAGER,
    )  # fmt: skip
    runner.kv_cache.fill_(torch.nan)  # D53: what was never written must not be read
    ours = teacher_forced_logits(runner, token_ids, chunks=[150, 90], block_table=[3, 1]).double()
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    error, plain_error = (ours - exact).norm(dim=1), (plain - exact).norm(dim=1)
    assert error.pow(2).mean().sqrt() <= 2 * plain_error.pow(2).mean().sqrt() + ulp


@pytest.mark.parametrize(
    ("backend", "head_dim", "block_size", "num_blocks"), [("torch", 16, 4, 48), ("triton", 32, 16, 20)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_tokens_equal_the_reference(
    architecture: str, backend: str, head_dim: int, block_size: int, num_blocks: int
) -> None:
    """Greedy and sampled, with chunks, prefix hits and preemptions forced by a small pool. D58: the noise is
    counter-based, so the device does not decide.
    """
    oracle = Oracle(tiny_model(architecture, head_dim=head_dim), max_model_len=80)
    prefix = random_tokens(24, seed=3)
    prompts = [[*prefix, *random_tokens(length, seed=length)] for length in (1, 3, 9, 17, 2, 5)] * 2
    params = [SamplingParams.greedy(max_tokens=30, ignore_eos=True)] * 6
    params += [SamplingParams(seed=7, top_p=0.9, temperature=0.8, max_tokens=30, ignore_eos=True)] * 6
    with LLM(
        str(oracle.model_dir), dtype="float32", attention_backend=backend, kv_cache_block_size=block_size,
        num_kv_cache_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=80, **EAGER,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert_occurred(scheduler_events(llm.scheduler), ["preemption", "prefill chunk", "block hit"])
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        oracle.check(prompt, param, param.seed or 0, output["token_ids"], output["finish_reason"])
    assert oracle.num_excused <= 1


@pytest.mark.whole_gpu
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [("float32", "torch"), ("float32", "triton"), *(("bfloat16", backend) for backend in BACKENDS)],
)
def test_the_bundled_model_generates_on_a_gpu_what_it_generates_on_a_cpu(dtype: str, backend: str) -> None:
    params = SamplingParams.greedy(max_tokens=48)
    with LLM(str(bundled_model_path()), device="cpu", attention_backend="torch", max_model_len=512) as llm:
        expected = tokens(llm, list(DEMO_PROMPTS), params)
    with LLM(str(bundled_model_path()), dtype=dtype, attention_backend=backend, max_model_len=512, **EAGER) as llm:
        assert llm.config.num_kv_cache_blocks is None  # sized from the GPU's memory
        assert tokens(llm, list(DEMO_PROMPTS), params) == expected


def share_in_use() -> float:
    """Of the GPU's memory, by other processes too."""
    free, total = torch.cuda.mem_get_info()
    return 1 - free / total


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_close_gives_gpu_memory_back(enforce_eager: bool) -> None:
    """D34. Libraries keep memory for each stream that they have used until the process ends: the first engine, with one
    graph, leaves that, and the next, with many, leaves no more.
    """

    def run(max_num_seqs: int) -> int:
        with LLM(
            str(bundled_model_path()), device="cuda", num_kv_cache_blocks=64, max_model_len=512,
            max_num_seqs=max_num_seqs, enforce_eager=enforce_eager,
        ) as llm:  # fmt: skip
            llm.generate("In the beginning", use_tqdm=False)
            return torch.cuda.memory_allocated()

    run(1)
    before = torch.cuda.memory_allocated()
    assert run(40) > before
    assert torch.cuda.memory_allocated() == before


@pytest.mark.whole_gpu
def test_the_cache_fills_the_memory_it_may_and_no_more() -> None:
    """D42: after warm-up, the largest step fits beside the cache."""
    share = share_in_use() + 0.05
    with LLM(
        str(bundled_model_path()), gpu_memory_utilization=share, max_num_seqs=256, max_model_len=2048, **EAGER
    ) as llm:
        assert share_in_use() <= share + 0.01
        prompts = [[5 + index % 400] * 60 for index in range(256)]
        params = SamplingParams(top_p=0.9, seed=1, max_tokens=4, ignore_eos=True)
        assert len(tokens(llm, prompts, params)) == 256
        assert share_in_use() <= share + 0.02


def test_too_little_memory_is_an_error_with_the_figures() -> None:
    """D43."""
    with pytest.raises(ValueError, match=r"gpu_memory_utilization must leave room .* GiB"):
        LLM(str(bundled_model_path()), gpu_memory_utilization=1e-6, **EAGER)


@pytest.mark.whole_gpu
def test_the_engine_runs_on_a_gpu_named_by_its_uuid() -> None:
    """D45"""
    uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    options = ["--device", "cuda", "--attention-backend", "torch", "--greedy", "--max-tokens", "4"]
    command = ("-m", "nanovllm", "generate", *options, "In the beginning")
    result = run_python(*command, CUDA_VISIBLE_DEVICES=f"GPU-{uuid}")
    assert (result.returncode, result.stdout.startswith(" God")) == (0, True), result.stderr
