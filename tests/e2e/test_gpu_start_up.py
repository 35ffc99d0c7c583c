"""An engine on a GPU compiles its kernels and collects garbage before the first request, so that none waits for it."""

import gc
import importlib
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.support.source_tree import module_name, python_files
from tests.support.tiny_models import tiny_model

LONG = list(range(5, 205))
# Long and short prompts, cached and not, in chunks, greedy and sampled.
PROMPTS = [[*LONG * 3, index] for index in range(6)] + [[7, index] for index in range(14)] + [LONG * 4, LONG * 4]
PARAMS = [SamplingParams.greedy(max_tokens=5), SamplingParams(seed=1, max_tokens=9, ignore_eos=True)]


def forget_compiled_kernels() -> None:
    """Drop what other tests of this process compiled. Loading it from the disk again counts as compiling here."""
    import triton

    for path in python_files("nanovllm/kernels"):
        for kernel in vars(importlib.import_module(module_name(path))).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_no_request_waits_for_the_compiler(architecture: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs, as the engine comes."""
    import triton

    model_dir = tiny_model(architecture, head_dim=head_dim, max_position_embeddings=1024)
    params = [PARAMS[index % 2] for index in range(len(PROMPTS))]
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"]))
    forget_compiled_kernels()
    with LLM(
        str(model_dir), device="cuda", dtype="bfloat16", attention_backend="triton", num_kv_cache_blocks=40,
        max_model_len=1024, max_num_seqs=20, max_num_batched_tokens=2048,
    ) as llm:  # fmt: skip
        num_at_start = len(compiled)
        for _ in range(2):
            llm.generate(PROMPTS, params, use_tqdm=False)
        assert llm.scheduler.num_prefill_chunks > 0
        assert llm.scheduler.block_manager.num_hit_blocks > 0
    assert num_at_start > 0
    assert not compiled[num_at_start:]


@pytest.mark.gpu
def test_no_request_waits_for_the_garbage_collector() -> None:
    """A collection of all objects is due when those made since the last one are more than a quarter."""
    generations: list[int] = []

    def record(phase: str, about: dict[str, Any]) -> None:
        generations.append(about["generation"])

    thresholds = gc.get_threshold()
    gc.disable()
    try:
        made_at_start = [[] for _ in range(10**6)]  # not collected in between, as they were if there were fewer
        with LLM(
            str(tiny_model("llama", head_dim=32)), device="cuda", dtype="bfloat16", attention_backend="triton",
            num_kv_cache_blocks=8, max_num_seqs=2,
        ) as llm:  # fmt: skip
            gc.set_threshold(10, 1, 1)
            gc.enable()
            gc.callbacks.append(record)
            try:
                llm.generate([[5, 6, 7]], PARAMS[1], use_tqdm=False)
            finally:
                gc.callbacks.remove(record)
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    assert len(made_at_start) == 10**6
    assert 1 in generations  # so a full collection would have run, had it been due
    assert 2 not in generations
