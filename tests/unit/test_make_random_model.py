"""tools/make_random_model.py: checkpoints that the engine takes, of the shapes that the benchmarks name."""

import pytest

from benchmarks.shapes import SHAPES, Shape
from nanovllm import LLM, SamplingParams
from nanovllm.models.registry import load_model_config
from tools import make_random_model as tool

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
}


@pytest.mark.parametrize("like", tool.SHAPES)
def test_shapes_are_those_of_the_benchmarks(like, tmp_path):
    tool.make_config(like).save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    moe = config.moe
    assert SHAPES[like] == Shape(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
        moe.moe_intermediate_size if moe else config.intermediate_size,
        config.vocab_size,
        moe.num_experts if moe else 0,
        moe.num_experts_per_tok if moe else 0,
        has_head_norm=config.model_type.startswith("qwen3"),
    )


@pytest.mark.parametrize("like", tool.SHAPES)
def test_the_engine_generates_from_such_a_model(like, tmp_path, monkeypatch):
    name, options = tool.SHAPES[like]
    monkeypatch.setitem(tool.SHAPES, like, (name, {**options, **{key: TINY[key] for key in TINY if key in options}}))
    tool.make_random_model(tmp_path, tool.make_config(like))
    with LLM(str(tmp_path), device="cpu", num_kv_cache_blocks=4) as llm:
        outputs = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert len(outputs[0]["token_ids"]) == 4


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"like must be one of qwen3-0.6b, .*, got 'gpt-5'"):
        tool.make_config("gpt-5")
