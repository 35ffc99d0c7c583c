"""The engine against transformers, through preemptions, prefix hits and chunks at once; on a GPU eagerly and in graphs.

transformers runs on the CPU in float64, and in the engine's dtype to see what rounding does to this model and text. A
greedy choice may fall short of float64's best logit by what rounding can do to the two: each by `factor` times
transformers' own largest error, plus half a unit in the last place, the rounding of the logit itself.
"""

from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.support.counts import count_comparisons, record_error
from tests.support.hugging_face import check_greedy_choices
from tests.support.oracle import ERROR_RATIO
from tests.support.tiny_models import VOCAB_SIZE, tiny_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "qwen3_moe"]
SETUPS = [("triton", "float32"), ("triton", "bfloat16"), ("flash_attn", "bfloat16")]
# float32: see tests/support/oracle.py. bfloat16: FlashAttention's own criterion, same dtype, another summation order.
FACTORS = {"float32": ERROR_RATIO, "bfloat16": 2.0}
BLOCKS: dict[str, Any] = {  # of 256, FlashAttention's; too few for three sequences of up to four each
    "num_kv_cache_blocks": 5,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 200,
    "max_model_len": 1024,
}


def assert_transformers_agrees(architecture: str, dtype: str, **options: Any) -> None:
    """Preemptions, prefix hits and chunks occur, and every token is one that transformers could have chosen."""
    model_dir = tiny_model(architecture, head_dim=32, initializer_range=0.1, max_position_embeddings=1024)
    generator = torch.Generator().manual_seed(6)
    prefix, *tails = (torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (300, 3, 17, 40))
    prompts = [[*prefix, *tail] for tail in tails]
    params = SamplingParams.greedy(max_tokens=480, ignore_eos=True)
    with LLM(str(model_dir), dtype=dtype, **BLOCKS, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.scheduler.num_preemptions > 0
        assert llm.scheduler.num_prefill_chunks > 0
        assert llm.scheduler.block_manager.num_hit_blocks > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output["token_ids"]) == params.max_tokens
        check = check_greedy_choices(model_dir, prompt, output["token_ids"], getattr(torch, dtype))
        half_place = torch.finfo(getattr(torch, dtype)).eps * check.largest_logit / 2
        bound = 2 * (FACTORS[dtype] * check.rounding + half_place)
        record_error(f"greedy choices against transformers, {dtype}", float(check.shortfalls.max()), bound)
        count_comparisons("engine: greedy tokens against transformers' logits", params.max_tokens)
        assert check.shortfalls.max() <= bound
        assert (check.shortfalls == 0).float().mean() >= 0.9


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_on_a_cpu(architecture: str) -> None:
    """In bfloat16; tests/e2e/test_hugging_face.py compares every variant in float32."""
    assert_transformers_agrees(architecture, "bfloat16", device="cpu", attention_backend="torch")


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize(("backend", "dtype"), SETUPS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_a_gpu(architecture: str, backend: str, dtype: str, enforce_eager: bool) -> None:
    assert_transformers_agrees(
        architecture, dtype, device="cuda", attention_backend=backend, enforce_eager=enforce_eager
    )
