"""Text of an engine's outputs, from generate and the stream, with special tokens and with byte tokens.

tests/unit/engine/test_text_of_tokenizers.py has stop strings and other vocabularies.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.e2e.conftest import bundled_llm, contents, joined
from tests.support.tiny_models import copy_model, tiny_model
from tests.unit.engine.text_tokenizers import byte_fallback

KNOWN = byte_fallback()
IM_END, THE, A, B, LINE_END = (KNOWN.id_of(token) for token in ("<|im_end|>", b" the", b" a", b"b", b"\n"))
PROMPT = [KNOWN.id_of("<s>"), B]


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    """A tiny model with a byte-fallback tokenizer, whose special token <|im_end|> ends a text."""
    directory = copy_model(tiny_model("llama"), tmp_path / "model", generation_config={"eos_token_id": IM_END})
    for path in directory.glob("tokenizer*"):
        path.unlink()
    KNOWN.tokenizer.save_pretrained(directory)
    with bundled_llm(directory) as llm:
        yield llm


def said(llm: LLM, monkeypatch: pytest.MonkeyPatch, completion: list[int], **options: Any) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens after PROMPT, if `completion` is sampled: of generate and the stream."""

    def sample(logits: torch.Tensor, rows: Any) -> torch.Tensor:
        return torch.tensor(completion)[rows.position - len(PROMPT)]

    monkeypatch.setattr(llm._core.executor._runner, "sampler", sample)
    params = SamplingParams.greedy(max_tokens=len(completion), **options)
    (output,) = contents(llm.generate([PROMPT], params, use_tqdm=False))
    assert joined(llm.generate_stream([PROMPT], params)) == [output]
    assert output["token_ids"] == completion[: len(output["token_ids"])]
    return output["text"], output["finish_reason"], len(output["token_ids"])


def test_special_token_that_is_also_the_end_of_sequence(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """D83: with ignore_eos the stop string ends the request, without it either does."""
    completion = [B, IM_END, LINE_END]
    for options in ({}, {"stop": "<|im_end|>"}, {"stop": "<|im_end|>", "ignore_eos": True}):
        assert said(llm, monkeypatch, completion, **options) == ("b", "stop", 2)
    assert said(llm, monkeypatch, completion, ignore_eos=True) == ("b\n", "length", 3)


def test_text_of_a_byte_fallback_vocabulary_follows_the_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """D82, D84: the space of the first word is there, a character that max_tokens cuts is one U+FFFD."""
    completion = [THE, A, LINE_END, KNOWN.id_of(b"\xf0"), KNOWN.id_of(b"\x9f")]
    assert said(llm, monkeypatch, completion) == (" the a\n\ufffd", "length", 5)
    assert llm.generate("b", SamplingParams.greedy(max_tokens=2), use_tqdm=False)[0]["text"] == " the a"
