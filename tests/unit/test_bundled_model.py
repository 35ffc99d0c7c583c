"""The bundled model is what its card says, and what the exact tests rely on."""

import json
import math
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
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
MAX_BYTES = 4_000_000
END_OF_TEXT = "<|endoftext|>"
# Twice what rounding may change in a logit: less than 0.5 was seen in bfloat16, less than 1e-4 in float32.
MIN_MARGIN = 1.0


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


@pytest.fixture(scope="module")
def continuations() -> dict[str, Continuation]:
    return dict(zip(DEMO_PROMPTS, greedy_continuations(MODEL, DEMO_PROMPTS, num_tokens=64), strict=True))


TOKENIZER = AutoTokenizer.from_pretrained(MODEL)


def test_the_directory_holds_the_checkpoint_and_its_card() -> None:
    assert {path.name for path in MODEL.iterdir()} == FILES


def test_the_files_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MAX_BYTES


def test_it_is_a_qwen3_that_loads_as_float32() -> None:
    config = AutoConfig.from_pretrained(MODEL)
    assert (config.model_type, config.architectures, config.dtype) == ("qwen3", ["Qwen3ForCausalLM"], torch.float32)


def test_its_heads_are_not_the_hidden_size_cut_up() -> None:
    """An engine that computes head_dim as hidden / heads must fail on this model."""
    config = AutoConfig.from_pretrained(MODEL)
    assert config.head_dim != config.hidden_size // config.num_attention_heads


def test_weights_have_the_shapes_that_the_config_states(weights: dict[str, torch.Tensor]) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    hidden, intermediate, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    of_a_layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    # Tied: the embedding is the output layer too, and no lm_head.weight is stored.
    expected = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_a_layer.items()}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected


def test_weights_are_finite_bfloat16(weights: dict[str, torch.Tensor]) -> None:
    """bfloat16 widens to float32 exactly, so every machine computes with the same float32 weights."""
    faulty = [name for name, weight in weights.items() if weight.dtype != torch.bfloat16 or not weight.isfinite().all()]
    assert faulty == []


def test_the_vocabulary_covers_every_byte() -> None:
    missing = set(ByteLevel.alphabet()) - set(TOKENIZER.get_vocab())
    assert len(ByteLevel.alphabet()) == 256
    assert missing == set()


@given(text=st.text().filter(lambda text: END_OF_TEXT not in text))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("source", ["tokenizer", "generation_config.json", "config.json"])
def test_every_source_names_the_same_end_of_text(source: str) -> None:
    eos = TOKENIZER.eos_token_id if source == "tokenizer" else json.loads((MODEL / source).read_text())["eos_token_id"]
    assert eos == TOKENIZER.convert_tokens_to_ids(END_OF_TEXT)


@pytest.mark.parametrize("prompt", DEMO_PROMPTS)
def test_demo_prompts_are_continued_out_of_the_text(prompt: str, continuations: dict[str, Continuation]) -> None:
    assert continuations[prompt].text in TEXT.read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", DEMO_PROMPTS)
def test_no_rounding_can_change_the_continuation_of_a_demo_prompt(
    prompt: str, continuations: dict[str, Continuation]
) -> None:
    least = continuations[prompt].margins.min().item()
    assert math.isfinite(least)
    assert least >= MIN_MARGIN


def test_it_ends_a_passage_with_the_end_of_text() -> None:
    (continuation,) = greedy_continuations(MODEL, ["And now abideth faith, hope, charity"], num_tokens=64)
    assert continuation.ended
    assert continuation.text == ", these three; but the greatest of these is charity."
