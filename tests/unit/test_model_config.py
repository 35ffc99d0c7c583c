"""load_model_config: both layouts of config.json, defaults, and what is refused. Plain JSON, no transformers.

It is one file of over 300 lines because config.json is one contract: every key has its tests here.
"""

import json
import re

import pytest

from nanovllm.model_config import MoEConfig
from nanovllm.models.registry import load_model_config
from nanovllm.rope_config import RopeConfig

BASE = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1000,
}
MOE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 250,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300}
MISSING = "missing"


def without_missing(values):
    return {key: value for key, value in values.items() if value is not MISSING}


def write(directory, generation=None, **changes):
    (directory / "config.json").write_text(json.dumps(without_missing(BASE | changes)))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))


def load(directory, generation=None, **changes):
    write(directory, generation, **changes)
    return load_model_config(directory)


NO_LENGTH = {"max_position_embeddings": MISSING}
NO_BIAS = {"qkv_bias": False, "o_bias": False, "mlp_bias": False}
ATTENTION_BIAS = {"qkv_bias": True, "o_bias": True, "mlp_bias": False}
QKV_BIAS = {"qkv_bias": True, "o_bias": False, "mlp_bias": False}


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("llama", {}, BASE),
        ("llama", {"head_dim": 24, "rms_norm_eps": 1e-5}, {"head_dim": 24, "rms_norm_eps": 1e-5}),
        ("llama", {}, {"rms_norm_eps": 1e-6, "dtype": "float32", "rope": RopeConfig("default", theta=10000.0)}),
        ("llama", {}, {"tie_word_embeddings": False, "eos_token_ids": frozenset(), "tokenizer_class": None}),
        ("llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizer"}),
        # Defaults of keys that are missing or null
        ("llama", NO_LENGTH, {"max_position_embeddings": 2048, "head_dim": 8}),
        ("mistral", NO_LENGTH | {"sliding_window": None}, {"max_position_embeddings": 131072, "head_dim": 8}),
        ("qwen2", NO_LENGTH, {"max_position_embeddings": 32768, "head_dim": 8}),
        ("qwen3", NO_LENGTH, {"max_position_embeddings": 32768, "head_dim": 128}),
        ("qwen3_moe", MOE | NO_LENGTH, {"max_position_embeddings": 32768, "head_dim": 8}),
        ("llama", {"head_dim": None}, {"head_dim": 8}),
        ("qwen3", {"head_dim": None}, {"head_dim": 8}),
        ("llama", {"num_key_value_heads": MISSING}, {"num_key_value_heads": 8}),
        ("qwen2", {"num_key_value_heads": None}, {"num_key_value_heads": 8}),
        ("llama", {"torch_dtype": None}, {"dtype": "float32"}),
        # Both layouts of dtype
        ("llama", {"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ("llama", {"torch_dtype": "float16"}, {"dtype": "float16"}),
        ("llama", {"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ("llama", {"dtype": "float32", "torch_dtype": "float16"}, {"dtype": "float32"}),
        # Biases, norms of queries and keys, experts
        ("llama", {}, NO_BIAS | {"qk_norm": False, "moe": None}),
        ("llama", {"attention_bias": True}, ATTENTION_BIAS),
        ("llama", {"mlp_bias": True}, NO_BIAS | {"mlp_bias": True}),
        ("mistral", {"attention_bias": True, "mlp_bias": True, "sliding_window": None}, NO_BIAS | {"qk_norm": False}),
        ("qwen2", {}, QKV_BIAS | {"qk_norm": False}),
        ("qwen2", {"attention_bias": False, "mlp_bias": True}, QKV_BIAS),
        ("qwen3", {"attention_bias": False, "mlp_bias": True}, NO_BIAS | {"qk_norm": True, "moe": None}),
        ("qwen3", {"attention_bias": True}, ATTENTION_BIAS | {"qk_norm": True}),
        ("qwen3_moe", MOE | {"num_experts": 0}, NO_BIAS | {"qk_norm": True, "moe": None}),
    ],
)
def test_keys_are_read_or_have_the_defaults_of_transformers(tmp_path, model_type, keys, expected):
    """D64, D66, D90"""
    config = load(tmp_path, **(keys | {"model_type": model_type}))
    assert {name: getattr(config, name) for name in expected} == expected


# Rope, in the old layout (rope_theta and rope_scaling) and the new one (rope_parameters).


def old_layout(parameters):
    theta = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
    rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return theta | {"rope_scaling": rest or None}


def old_layout_with_type(parameters):
    return old_layout({("type" if key == "rope_type" else key): value for key, value in parameters.items()})


def new_layout(parameters):
    return {"rope_parameters": parameters}


YARN_ATTENTION = 1.1386294361119891  # 0.1 ln 4 + 1


@pytest.mark.parametrize("layout", [old_layout, old_layout_with_type, new_layout])
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_type": "default", "rope_theta": 1e6}, RopeConfig(theta=1e6)),
        ({"rope_type": "linear", "factor": 2, "rope_theta": 1e4}, RopeConfig("linear", 1e4, 2.0)),
        (LLAMA3 | {"rope_theta": 5e5}, RopeConfig("llama3", 5e5, 8.0, 250, low_freq_factor=1.0, high_freq_factor=4.0)),
        (YARN, RopeConfig("yarn", 1e4, 4.0, 300, attention_factor=YARN_ATTENTION)),
        (YARN | {"attention_factor": 0.5}, RopeConfig("yarn", 1e4, 4.0, 300, attention_factor=0.5)),
        (
            YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
            RopeConfig("yarn", 1e4, 4.0, 300, 1.0, 4.0, 16.0, 2.0, False, YARN_ATTENTION),
        ),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, RopeConfig("yarn", 1e4, 4.0, 300, attention_factor=1.0)),
    ],
)
def test_rope_is_read_from_both_layouts(tmp_path, layout, parameters, expected):
    """D65: and equal ones have equal hashes, since the parameters are no dict."""
    rope = load(tmp_path, **layout(parameters)).rope
    assert (rope, hash(rope)) == (expected, hash(expected))


def test_length_of_the_training_is_max_position_embeddings_unless_stated(tmp_path):
    """As in transformers: a key of the config has precedence over one of the rope parameters."""
    parameters = without_missing(LLAMA3 | {"original_max_position_embeddings": MISSING})
    assert load(tmp_path, rope_scaling=parameters).rope.original_max_position_embeddings == 1000
    config = load(tmp_path, rope_scaling=LLAMA3, original_max_position_embeddings=77)
    assert config.rope.original_max_position_embeddings == 77


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 1000),
        ({"rope_type": "linear", "factor": 2.5}, 2500),
        (LLAMA3, 1000),
        (YARN, 1200),
        (YARN | {"original_max_position_embeddings": 200}, 1000),
    ],
)
def test_longest_supported_sequence_follows_from_the_rope_type(tmp_path, parameters, expected):
    assert load(tmp_path, rope_scaling=parameters).max_supported_len == expected


@pytest.mark.parametrize(("eos", "expected"), [(-1, set()), ([-1, 3], {3}), ([31, 32], {31})])
def test_end_of_sequence_id_outside_the_vocabulary_ends_nothing(tmp_path, eos, expected, caplog):
    """D89: some checkpoints state -1 for none. One warning names it."""
    assert load(tmp_path, eos_token_id=eos).eos_token_ids == expected
    assert caplog.messages == [
        f"eos_token_id {eos!r} of config.json names ids outside the vocabulary (0 to 31): these end no text"
    ]


@pytest.mark.parametrize("eos", ["</s>", [1, None], True, 1.5])
def test_end_of_sequence_id_that_is_no_integer_is_refused(tmp_path, eos):
    for file_name, generation in (("config.json", None), ("generation_config.json", {"eos_token_id": eos})):
        match = rf"eos_token_id \({file_name}\) must be an integer or a list .* got {re.escape(repr(eos))}$"
        with pytest.raises(ValueError, match=match):
            load(tmp_path, generation, eos_token_id=eos)


# What is accepted though it looks unsupported.


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0, "layer_types": ["full_attention"]},
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4},
        {"architectures": MISSING},
        {"architectures": []},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["Qwen2Model"]},
        {"hidden_act": "swish"},
        {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 1.0, "rope_type": "default"}},
    ],
)
def test_key_without_effect_is_accepted(tmp_path, changes):
    """D66, D89"""
    model_type = {"model_type": changes.get("model_type", "qwen2")}
    assert load(tmp_path, **(changes | model_type)) == load(tmp_path, **model_type)


# What is refused, by name.

WINDOW = {"use_sliding_window": True, "sliding_window": 128}
REFUSED = {
    "vocab_size missing": ({"vocab_size": MISSING}, "vocab_size must be an integer, but the key is missing"),
    "kv heads missing": ({"model_type": "qwen2", "num_key_value_heads": MISSING}, "num_key_value_heads must be an int"),
    "hidden_size 0": ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
    "layers 10**9": (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers must be an integer from 1 to 1000, got 1000000000",
    ),
    "vocab_size str": ({"vocab_size": "32"}, "vocab_size must be an integer of at least 1, got '32'"),
    "heads 6": ({"num_attention_heads": 6}, "hidden_size must be a multiple of num_attention_heads=6, got 64"),
    "head_dim odd": ({"head_dim": 5}, r"head_dim must be even .* got 5"),
    "kv heads 3": ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3, got 8"),
    "dtype int8": ({"torch_dtype": "int8"}, "dtype must be one of .* got 'int8'"),
    "tokenizer_class": ({"tokenizer_class": 3}, "tokenizer_class must be a string, got 3"),
    "other task": ({"architectures": ["LlamaForSequenceClassification"]}, "must contain 'LlamaForCausalLM'.*supports"),
    "another base model": ({"architectures": ["Qwen3Model"]}, "architectures of a llama checkpoint must contain"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\) is not supported"),
    "compressed": ({"compression_config": "fp8"}, r"compression_config \(fp8\) is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act must be 'silu' .* got 'gelu'"),
    "activation null": ({"hidden_act": None}, "hidden_act must be 'silu' .* got None"),
    "mrope": ({"use_mrope": True}, "use_mrope .* is not supported"),
    "architectures": ({"architectures": 5}, "architectures must be a list, got 5"),
    "layer types": ({"layer_types": ["full_attention", "linear_attention"]}, "sliding window.*got linear_attention"),
    "window": (WINDOW, "sliding_window=128.* is not supported"),
    "qwen2 window": (WINDOW | {"model_type": "qwen2", "max_window_layers": 2}, "sliding_window=128.* is not support"),
    "moe window": (MOE | WINDOW | {"max_window_layers": 99}, "sliding_window=128.* is not supported"),
    "mistral window": ({"model_type": "mistral", "sliding_window": 128}, "sliding_window=128.* is not supported"),
    "mistral default window": ({"model_type": "mistral"}, "sliding_window=4096.* is not supported"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    "partial rope within": ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
    "rope no dict": ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
    "rope per layer": ({"rope_parameters": {"full_attention": {}}}, "per-layer .* are not supported, .*full_attention"),
    "rope parameter": ({"rope_scaling": {"mrope_section": [1]}}, "rope parameters must be among .* got mrope_section"),
    "yarn theta": ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta must be another number than 1 for yarn"),
    "no size": ({"intermediate_size": 10**30}, "intermediate_size must be at most 2147483647, got 1000000000000000"),
    "rope high < low": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "high_freq_factor must be above low_freq"),
    "no experts": (MOE | {"num_experts": MISSING}, r"num_experts \(or num_local_experts\) must be given, and once"),
    "experts twice": (MOE | {"num_local_experts": 4}, r"num_experts \(or num_local_experts\) must be given, and once"),
    "too few experts": (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok must be an integer from 1 to 8, got 9"),
    "experts of a token": (MOE | {"num_experts_per_tok": MISSING}, "num_experts_per_tok must be an integer, but"),
}
REFUSED |= {
    f"rope type {rope_type}": (
        {"rope_scaling": {"rope_type": rope_type, "factor": 2.0}},
        f"rope_type must be one of 'default', 'linear', 'llama3', 'yarn', got {rope_type!r}",
    )
    for rope_type in ("dynamic", "longrope", "mrope", 3)
}
REFUSED |= {
    f"{rope_type} factor {factor}": (
        {"rope_scaling": without_missing(LLAMA3 | {"rope_type": rope_type, "factor": factor})},
        "rope factor must be a number from 1 to 1000000, got",
    )
    for rope_type, factor in (
        ("linear", MISSING),
        ("yarn", 0.5),
        ("llama3", "2"),
        ("linear", float("inf")),
        ("yarn", 1e308),
    )
}
REFUSED |= {
    key: ({"rope_scaling": without_missing(LLAMA3 | {key: MISSING})}, f"{key} must be a number, but the key is missing")
    for key in ("low_freq_factor", "high_freq_factor")
}
REFUSED |= {
    f"model_type {model_type}": ({"model_type": model_type}, "model_type must be one of llama, mistral, qwen2, .* got")
    for model_type in ("gemma3", "", None, 3, ["llama"])
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_or_wrong_value_is_refused_by_name(tmp_path, changes, match):
    """D63, D65, D66, D90"""
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"config.json: .*{match}"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("counts", [{}, {"num_experts": MISSING, "num_local_experts": 8}, {"num_local_experts": 8}])
def test_experts_are_read_from_either_key(tmp_path, counts):
    moe = load(tmp_path, **(MOE | counts), norm_topk_prob=True).moe
    assert moe == MoEConfig(8, 2, 32, norm_topk_prob=True, layers=frozenset({0, 1, 2, 3}))


@pytest.mark.parametrize(
    ("mlp_only_layers", "decoder_sparse_step", "expected"),
    [([0, 3], 1, {1, 2}), ([], 2, {1, 3}), ([1], 2, {3}), (None, 3, {2}), ([0, 1, 2, 3], 1, None), ([], 9, None)],
)
def test_sparse_layers_follow_from_step_and_exceptions(tmp_path, mlp_only_layers, decoder_sparse_step, expected):
    """expected: None for a model that is dense."""
    changes = {"mlp_only_layers": mlp_only_layers, "decoder_sparse_step": decoder_sparse_step}
    moe = load(tmp_path, **MOE, **changes).moe
    assert (moe and moe.layers) == expected


# Files.


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_is_named_in_a_warning_or_refused_without_a_model(tmp_path, name, caplog):
    """D95: its weights are not applied."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds a LoRA adapter \({name}\) and no config.json: merge it"):
        load_model_config(tmp_path)
    assert caplog.messages == []
    load(tmp_path)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path} holds a LoRA adapter ({name}), which is not applied: merge it")


def test_missing_directory_or_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model must be a directory that exists, got .*nowhere"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must hold a config"):
        load_model_config(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{}", b"[1]", b"null", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_file_is_named(tmp_path, name, content):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} must (be a JSON file that can be read|hold a JSON object)"):
        load_model_config(tmp_path)
