"""The engine on a real model, SmolLM2-135M-Instruct, against transformers: tokens, texts and ends.

`make real-model` makes the model's directory, `python -m pytest -m real_model` runs these tests. A tiny random model
has no end-of-sequence token that it expects, no text that a user would read and no long context that matters; this one
has. transformers reads each prompt with our tokens after it, in one forward pass: it would have generated the same if
each of our tokens is its argmax. Where one is not, it may fall short of the best of the exact logits by what
num_excused says. Exact are float64's logits for float32, and for bfloat16 float32's: their unit in the last place
is 2**-16 of bfloat16's, and they take a fraction of the time.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.tokenizer import load_tokenizer
from tests.e2e.real_model_prompts import CHINESE, PLAIN_TEXTS, forty_prompts
from tests.support.engine_events import assert_occurred, scheduler_events
from tests.support.hugging_face import num_excused
from tools.real_model import REAL_MODEL

pytestmark = pytest.mark.real_model

EXACT = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
MAX_TOKENS = 32
WITH_PRESSURE: dict[str, Any] = {  # the longest prompt takes 73 blocks
    "kv_cache_block_size": 16,
    "num_kv_cache_blocks": 82,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "max_model_len": 1280,
}
OPTIONS: dict[str, Any] = {"device": "cpu", "attention_backend": "torch"}


@pytest.fixture(scope="module")
def model() -> Path:
    if not (REAL_MODEL / "config.json").exists():
        pytest.skip("needs the real model: make real-model")
    return REAL_MODEL


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_forty_prompts_under_pressure_generate_what_transformers_would(model: Path, dtype: torch.dtype) -> None:
    with LLM(str(model), dtype=str(dtype)[6:], **OPTIONS, **WITH_PRESSURE) as llm:
        prompts = forty_prompts(llm.tokenizer)
        assert len(prompts) == 40
        outputs = llm.generate(prompts, SamplingParams.greedy(max_tokens=MAX_TOKENS), use_tqdm=False)
        assert_occurred(scheduler_events(llm.scheduler), ["preemption", "prefill chunk", "block hit"])
        tokenizer = llm.tokenizer
    num_different = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        token_ids = output["token_ids"]
        num_different += num_excused(model, prompt, token_ids, dtype, EXACT[dtype])
        assert output["text"] == tokenizer.decode(token_ids, skip_special_tokens=True)
        has_ended = token_ids[-1] == tokenizer.eos_token_id
        assert output["finish_reason"] == ("stop" if has_ended else "length")
        assert has_ended or len(token_ids) == MAX_TOKENS
        assert tokenizer.eos_token_id not in token_ids[:-1]
    assert any(output["finish_reason"] == "stop" for output in outputs)
    assert num_different <= {torch.float32: 2, torch.bfloat16: 60}[dtype], "of about 1200 tokens"


def test_digits_are_tokens_of_their_own(model: Path) -> None:
    """As in the published tokenizer: each digit is split off before words are, so two spaces before one stay together.

    The token ids of the last text were written down from that rule.
    """
    tokenizer = load_tokenizer(model)
    assert tokenizer.tokenize("x = 2024") == ["x", "Ġ=", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.tokenize("a  5") == ["a", "ĠĠ", "5"]
    for text in (*CHINESE, *PLAIN_TEXTS):
        assert tokenizer.decode(tokenizer.encode(text)) == text
