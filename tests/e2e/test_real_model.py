"""The engine on a real model, SmolLM2-135M-Instruct, against transformers: tokens, texts, stops and seeds.

`make real-model` makes the model's directory, `python -m pytest -m real_model` runs these tests. A tiny random model
has no end-of-sequence token that it expects, no text that a user would read and no long context that matters; this one
has. transformers reads each prompt with our tokens after it, in one forward pass: it would have generated the same if
each of our tokens is its argmax. Where one is not, it may fall short of the best of the exact logits by what
allowed_shortfall says. Exact are float64's logits for float32, and for bfloat16 float32's: their unit in the last place
is 2**-16 of bfloat16's, and they take a fraction of the time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.e2e.conftest import contents, joined
from tests.e2e.real_model_prompts import CHINESE, PLAIN_TEXTS, QUESTIONS, forty_prompts
from tests.support.counts import count_comparisons, count_event, record_error
from tests.support.hugging_face import allowed_shortfall, load_hugging_face
from tests.support.row_by_row import row_by_row
from tools.real_model import REAL_MODEL

pytestmark = pytest.mark.real_model

EXACT = {"float32": torch.float64, "bfloat16": torch.float32}
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


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    """An engine with room for everything."""
    with LLM(str(model), dtype="float32", **OPTIONS, max_model_len=1280, num_kv_cache_blocks=160) as llm:
        yield llm
        assert llm.is_finished()


@torch.inference_mode()
def logits_before(model: Path, prompt: list[int], token_ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """[len(token_ids), V] logits from which transformers, in `dtype`, would choose each of token_ids after prompt."""
    inputs = torch.tensor([[*prompt, *token_ids]])
    return load_hugging_face(model, dtype)(inputs, logits_to_keep=len(token_ids) + 1).logits[0, :-1]


def num_excused(model: Path, prompt: list[int], token_ids: list[int], dtype: str) -> int:
    """How many of token_ids are not transformers' argmax in `dtype`. Fails where that is not rounding."""
    rounded = logits_before(model, prompt, token_ids, getattr(torch, dtype))
    count_comparisons("engine: a real model's greedy tokens against transformers", len(token_ids))
    excused = int((rounded.argmax(dim=1) != torch.tensor(token_ids)).sum())
    if excused:
        exact = logits_before(model, prompt, token_ids, EXACT[dtype])
        allowed = allowed_shortfall(rounded, exact, getattr(torch, dtype))
        chosen = exact.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        shortfall = float((exact.amax(dim=1) - chosen).max())
        record_error(f"greedy choices of a real model, {dtype}", shortfall, allowed)
        assert shortfall <= allowed, (prompt[-20:], token_ids)
    return excused


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forty_prompts_under_pressure_generate_what_transformers_would(model: Path, dtype: str) -> None:
    with LLM(str(model), dtype=dtype, **OPTIONS, **WITH_PRESSURE) as llm:
        prompts = forty_prompts(llm.tokenizer)
        assert len(prompts) == 40
        outputs = llm.generate(prompts, SamplingParams.greedy(max_tokens=MAX_TOKENS), use_tqdm=False)
        events = {
            "preemption": llm.scheduler.num_preemptions,
            "prefill chunk": llm.scheduler.num_prefill_chunks,
            "block hit": llm.scheduler.block_manager.num_hit_blocks,
        }
        tokenizer = llm.tokenizer
    assert all(events.values()), events
    for name, number in events.items():
        count_event(name, number)
    num_different = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        token_ids = output["token_ids"]
        num_different += num_excused(model, prompt, token_ids, dtype)
        assert output["text"] == tokenizer.decode(token_ids, skip_special_tokens=True)
        has_ended = token_ids[-1] == tokenizer.eos_token_id
        assert output["finish_reason"] == ("stop" if has_ended else "length")
        assert has_ended or len(token_ids) == MAX_TOKENS
        assert tokenizer.eos_token_id not in token_ids[:-1]
    assert any(output["finish_reason"] == "stop" for output in outputs)
    assert num_different <= {"float32": 2, "bfloat16": 60}[dtype], "of about 1200 tokens"


def test_streams_and_chats_give_the_texts_of_generate(llm: LLM) -> None:
    chats = [[{"role": "user", "content": content}] for content in (QUESTIONS[0], CHINESE[0], "Show me an emoji 🙂")]
    params = SamplingParams.greedy(max_tokens=24)
    expected = contents(llm.chat(chats, params, use_tqdm=False))
    assert joined(llm.chat_stream(chats, params)) == expected
    for chat, output in zip(chats, expected, strict=True):
        assert "".join(item["text"] for item in llm.chat_stream(chat, params)) == output["text"]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    whole = llm.chat(chat, SamplingParams.greedy(max_tokens=24), use_tqdm=False)[0]["text"]
    stop = whole.split()[2]
    stopped = llm.chat(chat, SamplingParams.greedy(max_tokens=24, stop=stop), use_tqdm=False)[0]
    assert stopped["text"] == whole.partition(stop)[0]
    assert stopped["finish_reason"] == "stop"


def test_a_seed_gives_one_text_alone_and_under_pressure(model: Path) -> None:
    """Bit for bit, hence row by row: the arithmetic of a batch may differ in the last bit, and so may a draw."""
    chats = [[{"role": "user", "content": content}] for content in (*QUESTIONS[:4], QUESTIONS[0])]
    params = [
        SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=seed, max_tokens=48, ignore_eos=True)
        for seed in (1, 2, 3, 4, 1)
    ]
    limits = {"num_kv_cache_blocks": 9, "max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 128}
    options = {"dtype": "float32", "kv_cache_block_size": 16, **OPTIONS}
    with row_by_row():
        with LLM(str(model), **options, num_kv_cache_blocks=64, max_model_len=128) as llm:
            alone = [llm.chat(chat, param, use_tqdm=False)[0] for chat, param in zip(chats, params, strict=True)]
        with LLM(str(model), **options, **limits) as llm:
            together = llm.chat(chats, params, use_tqdm=False)
            assert llm.scheduler.num_preemptions > 0
            assert llm.scheduler.num_prefill_chunks > 0
            assert llm.scheduler.block_manager.num_hit_blocks > 0
    assert contents(together) == contents(alone)
    assert together[0]["text"] == together[4]["text"], "the same prompt and seed"
    assert len({output["text"] for output in alone}) == 4


def test_digits_are_tokens_of_their_own(llm: LLM) -> None:
    """As in the published tokenizer: each digit is split off before words are, so two spaces before one stay together.

    The token ids of the last text were written down from that rule.
    """
    tokenizer = llm.tokenizer
    assert tokenizer.tokenize("x = 2024") == ["x", "Ġ=", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.tokenize("a  5") == ["a", "ĠĠ", "5"]
    for text in (*CHINESE, *PLAIN_TEXTS):
        assert tokenizer.decode(tokenizer.encode(text)) == text
