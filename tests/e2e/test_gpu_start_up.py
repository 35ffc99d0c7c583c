"""What an engine compiles on a GPU, it compiles before the first request."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.source_tree import ROOT
from tests.tiny_models import tiny_model

LONG = list(range(5, 205))
# Of many tokens and of few, found in the cache and not, in chunks, and drawn in every way.
PROMPTS = [[*LONG * 3, index] for index in range(6)] + [[7, index] for index in range(14)] + [LONG * 4, LONG * 4]
PARAMS = [SamplingParams.greedy(max_tokens=5), SamplingParams(seed=1, max_tokens=9, ignore_eos=True)]


def forget_what_was_compiled() -> None:
    """By other tests of this process; what lies on the disk is loaded again, which counts as compiling here."""
    import triton

    for path in sorted((ROOT / "nanovllm" / "kernels").glob("*.py")):
        if path.stem in ("__init__", "flash_attention"):
            continue
        for kernel in vars(importlib.import_module(f"nanovllm.kernels.{path.stem}")).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()


def served(model_dir: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], list[str]]:
    """Kernels that were compiled before the first request, and during the requests."""
    import triton

    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"]))
    forget_what_was_compiled()
    with LLM(
        str(model_dir), device="cuda", dtype="bfloat16", attention_backend="triton", num_kv_cache_blocks=40,
        max_model_len=1024, max_num_seqs=20, max_num_batched_tokens=2048, **options,
    ) as llm:  # fmt: skip
        at_start = list(compiled)
        for _ in range(2):
            params = [PARAMS[index % 2] for index in range(len(PROMPTS))]
            llm.generate(PROMPTS, params, use_tqdm=False)
        assert llm.scheduler.num_prefill_chunks > 0
        assert llm.scheduler.block_manager.num_hit_blocks > 0
    return at_start, compiled[len(at_start) :]


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_no_request_waits_for_the_compiler(architecture: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs, as the engine comes."""
    model_dir = tiny_model(architecture, head_dim=head_dim, max_position_embeddings=1024)
    at_start, later = served(model_dir, monkeypatch)
    assert at_start
    assert not later
