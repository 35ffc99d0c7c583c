"""checkpoint, transformer and generate against transformers and safetensors, on tiny models with random weights.

The reference computes in float64. transformers, asked for float64, still computes norms, the router's softmax and
rotary angles in float32, whose relative rounding is 2**-24 = 6e-8; an angle of 40 radians is off by 40 * 6e-8 = 2.4e-6.
With logits of size 1 to 10 behind two layers, 1e-4 bounds what that can do (seen: below 2e-5); MISTAKE, the least
effect that a forgotten bias, norm or scaling is shown to have, is ten thousand times larger.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from reference.checkpoint import Checkpoint, load_checkpoint
from reference.generate import generate
from reference.sampling import allowed_mask, sampling
from reference.transformer import transformer
from tests.support.comparing import assert_close
from tests.support.counts import count_comparisons

BOUND, MISTAKE = 1e-4, 1.0
NUM_TOKENS = 40
CLASSES: dict[str, tuple[Callable, Callable]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": 60,
    "bos_token_id": None,
    "pad_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {"head_dim": 12, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}
TRAINED = {"original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, **TRAINED},
}
MORE_ROPES: dict[str, dict[str, Any]] = {
    "yarn, attention factor given": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, **TRAINED},
    "yarn, betas given": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, **TRAINED},
    "yarn, not truncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, **TRAINED},
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, **TRAINED},
    "yarn, some pairs left alone": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn, length trained on not given": {"rope_type": "yarn", "factor": 4.0},
}


def build(architecture: str, seed: int = 0, rope: dict[str, Any] | None = None, **options: Any) -> torch.nn.Module:
    """A random model in which every parameter matters: biases are not 0, norms not 1."""
    config_class, model_class = CLASSES[architecture]
    theta = {"rope_theta": 100.0}  # so that the frequencies of a small head differ within NUM_TOKENS positions
    config = config_class(
        **{**BASE, **OWN[architecture], "rope_parameters": {**theta, **(rope or ROPES["default"])}, **options}
    )
    config._experts_implementation = "eager"  # the default, a grouped product, does not take float64
    model = model_class(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def token_ids(seed: int = 1) -> list[int]:
    return torch.randint(0, 60, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(checkpoint: Checkpoint) -> torch.Tensor:
    return transformer(token_ids(), *checkpoint)


def check(model: Any, folder: Path) -> torch.Tensor:
    """The reference's logits, once they are known to be transformers'."""
    with torch.no_grad():
        expected = model(torch.tensor([token_ids()])).logits[0]
    actual = logits_of(load_checkpoint(folder, torch.float64))
    assert actual.dtype == torch.float64
    assert_close("reference: logits against transformers", actual, expected, rtol=0, atol=BOUND)
    return actual


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", CLASSES)
def test_logits_of_every_architecture_with_every_rope_type(architecture: str, rope: str, tmp_path: Path) -> None:
    """D64, D65."""
    model = build(architecture, rope=ROPES[rope])
    check(model, saved(model, tmp_path))


@pytest.mark.parametrize("rope", MORE_ROPES)
def test_logits_with_what_yarn_can_be_told(rope: str, tmp_path: Path) -> None:
    model = build("llama", rope=MORE_ROPES[rope])
    check(model, saved(model, tmp_path))


OPTIONS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 20}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
]


@pytest.mark.parametrize(("architecture", "options"), OPTIONS, ids=str)
def test_logits_with_options(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(architecture, **options)
    check(model, saved(model, tmp_path))


@pytest.mark.parametrize(
    ("architecture", "part"),
    [
        ("llama", "self_attn.o_proj.bias"),
        ("qwen2", "self_attn.k_proj.bias"),
        ("qwen3", "self_attn.q_norm.weight"),
        ("qwen3_moe", "mlp.gate.weight"),
        ("llama", "rope_scaling"),
    ],
)
def test_the_bound_is_far_below_the_effect_of_a_mistake(architecture: str, part: str, tmp_path: Path) -> None:
    """Without this, a bound that is too wide, or weights that are too small, would let anything pass."""
    model = build(architecture, rope=LLAMA3, **({"attention_bias": True} if "o_proj" in part else {}))
    weights, config = load_checkpoint(saved(model, tmp_path), torch.float64)
    right = logits_of(Checkpoint(weights, config))
    if part == "rope_scaling":
        wrong = Checkpoint(weights, type(config)(**{**vars(config), "rope_scaling": None}))
    else:
        name = f"model.layers.0.{part}"
        neutral = torch.ones_like(weights[name]) if "norm" in part else torch.zeros_like(weights[name])
        wrong = Checkpoint({**weights, name: neutral}, config)
    assert (logits_of(wrong) - right).abs().max() > MISTAKE


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("rope", ["default", "llama3"])
def test_the_config_layout_of_transformers_4_loads_alike(architecture: str, rope: str, tmp_path: Path) -> None:
    """D65, D66: rope_theta and rope_scaling, num_experts, torch_dtype, a head_dim that is null."""
    model: Any = build(architecture, rope=ROPES[rope])
    expected = check(model, saved(model, tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    rope_type = parameters.pop("rope_type")
    config["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **parameters}
    config["torch_dtype"] = config.pop("dtype")
    if architecture == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", None) or config["num_experts"]
    if architecture == "llama":
        config["head_dim"] = None
    path.write_text(json.dumps(config))
    assert torch.equal(logits_of(load_checkpoint(tmp_path, torch.float64)), expected)


def test_a_sharded_checkpoint_loads_alike(tmp_path: Path) -> None:
    model: Any = build("qwen3_moe")
    whole = load_checkpoint(saved(model, tmp_path / "whole"), torch.float64)
    sharded = load_checkpoint(saved(model, tmp_path / "sharded", max_shard_size="40KB"), torch.float64)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert whole.weights.keys() == sharded.weights.keys()
    assert all(torch.equal(tensor, sharded.weights[name]) for name, tensor in whole.weights.items())


def test_tied_weights_are_one_matrix(tmp_path: Path) -> None:
    """D67."""
    model: Any = build("llama", tie_word_embeddings=True)
    weights, _ = load_checkpoint(saved(model, tmp_path), torch.float64)
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_are_read_as_their_own_library_reads_them(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = build("qwen2").to(dtype)
    weights, _ = load_checkpoint(saved(model, tmp_path), dtype)
    expected = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())


def test_the_ids_that_end_a_text_come_from_both_files(tmp_path: Path) -> None:
    """D70."""
    model: Any = build("llama")
    model.generation_config.eos_token_id = [3, 5]
    assert load_checkpoint(saved(model, tmp_path)).config.eos_token_ids == {3, 5, 60}


@pytest.mark.parametrize("architecture", CLASSES)
def test_greedy_generation_is_that_of_transformers(architecture: str, tmp_path: Path) -> None:
    model: Any = build(architecture)
    prompt = token_ids()[:7]
    expected = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 7), do_sample=False, max_new_tokens=20, pad_token_id=0
    )[0, 7:].tolist()
    checkpoint = load_checkpoint(saved(model, tmp_path), torch.float64)
    actual = generate(checkpoint, prompt, max_tokens=20, top_k=1)
    best, second = actual.logits.topk(2).values.T
    assert (best - second).min() > 2 * BOUND, "no tie that rounding could turn"
    assert actual.token_ids == expected
    count_comparisons("reference: generated tokens against transformers", len(expected))
    assert actual.finish_reason == ("stop" if expected[-1] == 60 else "length")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(saved(build("qwen3"), tmp_path_factory.mktemp("qwen3")), torch.float64)


def test_each_token_is_sampled_from_the_logits_after_the_text_so_far(checkpoint: Checkpoint) -> None:
    prompt, options = token_ids()[:5], {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    result = generate(checkpoint, prompt, max_tokens=10, ignore_eos=True, **options)
    once = transformer([*prompt, *result.token_ids], *checkpoint)
    torch.testing.assert_close(result.logits, once[4:14], rtol=0, atol=1e-11)
    again = [sampling(row, **options, position=5 + i) for i, row in enumerate(result.logits)]
    assert result.token_ids == again
    assert generate(checkpoint, prompt, 10, ignore_eos=True, **{**options, "seed": 6}).token_ids != again


def test_where_a_text_ends(checkpoint: Checkpoint) -> None:
    prompt = token_ids()[:5]
    free = generate(checkpoint, prompt, max_tokens=8, top_k=1, ignore_eos=True)
    first = free.token_ids[3]
    cut = free.token_ids.index(first) + 1
    assert (len(free.token_ids), free.finish_reason) == (8, "length")
    for ending in ({"stop_token_ids": [first], "ignore_eos": True}, {"eos_token_ids": [59, first]}):
        stopped = generate(checkpoint, prompt, max_tokens=8, top_k=1, **ending)
        assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:cut], "stop")
    ignored = generate(checkpoint, prompt, max_tokens=8, top_k=1, eos_token_ids=[first], ignore_eos=True)
    assert ignored.token_ids == free.token_ids
    capped = generate(checkpoint, prompt, max_tokens=8, top_k=1, ignore_eos=True, max_model_len=7)
    assert (capped.token_ids, capped.finish_reason) == (free.token_ids[:2], "length")


def test_a_folder_and_its_checkpoint_generate_alike(tmp_path: Path) -> None:
    folder = saved(build("llama"), tmp_path)
    from_checkpoint = generate(load_checkpoint(folder), [1, 2, 3], max_tokens=3, seed=1)
    from_folder = generate(folder, [1, 2, 3], max_tokens=3, seed=1)
    assert from_folder.token_ids == from_checkpoint.token_ids


@pytest.mark.parametrize("filters", [(5, None, None), (None, 0.6, None), (None, None, 0.2), (30, 0.8, 0.1)])
def test_filters_equal_those_of_transformers(filters: tuple[int | None, float | None, float | None]) -> None:
    top_k, top_p, min_p = filters
    warpers = LogitsProcessorList()
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    for seed in range(20):
        z = 2 * torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected: Any = warpers(torch.zeros(1, 1, dtype=torch.long), z[None])
        assert torch.equal(allowed_mask(z, top_k, top_p, min_p), expected[0].isfinite())
        count_comparisons("reference: sampling filters against transformers", len(z))
