"""The bundled model is what its card says, and what the exact tests rely on."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer

from nanovllm.assets import bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS
from tools.bundled_model.check import Continuation, greedy_continuations

MODEL = bundled_model_path()
TEXT = Path(__file__).parents[2] / "tools" / "bundled_model" / "text.txt"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
MAX_BYTES = 4_000_000
END_OF_TEXT = "<|endoftext|>"
# Twice what rounding may change in a logit: less than 0.5 was seen in bfloat16, less than 1e-4 in float32.
MIN_MARGIN = 1.0


@pytest.fixture(scope="module")
def continuations() -> dict[str, Continuation]:
    return dict(zip(DEMO_PROMPTS, greedy_continuations(MODEL, DEMO_PROMPTS, num_tokens=64), strict=True))


def test_the_directory_holds_the_checkpoint_and_its_card_and_is_small_enough_to_ship() -> None:
    configs = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in MODEL.iterdir()} == {"README.md", "model.safetensors"} | configs
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MAX_BYTES


def test_it_is_a_qwen3_whose_head_dim_is_not_the_hidden_size_over_the_heads() -> None:
    """An engine that computes head_dim as hidden / heads must fail on this model."""
    config = AutoConfig.from_pretrained(MODEL)
    assert (config.model_type, config.architectures, config.dtype) == ("qwen3", ["Qwen3ForCausalLM"], torch.float32)
    assert config.head_dim != config.hidden_size // config.num_attention_heads


def test_weights_are_finite_bfloat16() -> None:
    """bfloat16 widens to float32 exactly, so every machine computes with the same float32 weights."""
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    faulty = [name for name, weight in weights.items() if weight.dtype != torch.bfloat16 or not weight.isfinite().all()]
    assert (faulty, "lm_head.weight" in weights) == ([], False), "the embedding is the head too, and is stored once"


@given(text=st.text().filter(lambda text: END_OF_TEXT not in text))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert set(ByteLevel.alphabet()) <= set(TOKENIZER.get_vocab()), "every byte is a token"


def test_every_source_names_the_same_end_of_text() -> None:
    in_files = [
        json.loads((MODEL / name).read_text())["eos_token_id"] for name in ("generation_config.json", "config.json")
    ]
    assert {TOKENIZER.eos_token_id, *in_files} == {TOKENIZER.convert_tokens_to_ids(END_OF_TEXT)}


@pytest.mark.parametrize("prompt", DEMO_PROMPTS)
def test_demo_prompt_is_continued_by_its_text_and_no_rounding_can_change_that(prompt: str, continuations) -> None:
    assert continuations[prompt].text in TEXT.read_text(encoding="utf-8")
    margins = continuations[prompt].margins
    assert margins.isfinite().all()
    assert float(margins.min()) >= MIN_MARGIN


def test_it_ends_a_passage_with_the_end_of_text() -> None:
    (continuation,) = greedy_continuations(MODEL, ["And now abideth faith, hope, charity"], num_tokens=64)
    assert (continuation.text, continuation.ended) == (", these three; but the greatest of these is charity.", True)
