"""Random checkpoints: ones that the engine takes, of the shapes that the benchmarks name."""

import pytest

from benchmarks.shapes import SHAPES, Shape
from nanovllm import LLM, SamplingParams
from nanovllm.bench import random_model as tool
from nanovllm.models.registry import load_model_config
from tests.support.programs import run_python


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


def test_the_engine_generates_from_such_a_model(tmp_path, monkeypatch):
    tiny = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    tiny |= {"num_hidden_layers": 2, "vocab_size": 200}
    name, options = tool.SHAPES["qwen3-30b-a3b"]
    monkeypatch.setitem(tool.SHAPES, "qwen3-30b-a3b", (name, options | tiny))
    tool.make_random_model(tmp_path, tool.make_config("qwen3-30b-a3b"))
    with LLM(str(tmp_path), device="cpu", num_kv_cache_blocks=4) as llm:
        outputs = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert len(outputs[0]["token_ids"]) == 4


def test_torch_is_imported_with_sleeping_threads():
    """D97: transformers looks for torch when it is imported, and imports it with the class of a configuration."""
    code = """
import os, sys
from nanovllm.bench.random_model import make_config
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Finder())
make_config("qwen3-0.6b")
print("torch" in sys.modules)
"""
    result = run_python("-c", code)
    assert set(result.stdout.split()) == {"passive", "True"}, result.stderr
