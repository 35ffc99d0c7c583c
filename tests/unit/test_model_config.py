"""load_model_config: both layouts of config.json, defaults, and what is refused. Plain JSON, no transformers.

It is one file of over 300 lines because config.json is one contract: every key has its tests here.
"""

import json

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
MISSING = object()


def write(directory, generation=None, **changes):
    raw = {key: value for key, value in (BASE | changes).items() if value is not MISSING}
    (directory / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))


def load(directory, generation=None, **changes):
    write(directory, generation, **changes)
    return load_model_config(directory)


def refused(directory, match, **changes):
    write(directory, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        load_model_config(directory)
    return str(caught.value)


def test_shapes_are_read(tmp_path):
    config = load(tmp_path, head_dim=24, rms_norm_eps=1e-5, tie_word_embeddings=True)
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("llama", 32, 64)
    assert (config.intermediate_size, config.num_hidden_layers, config.head_dim) == (128, 4, 24)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 2)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (1000, 1e-5, True)


def test_config_is_hashable_and_frozen(tmp_path):
    """D65: the rope parameters are no dict."""
    config = load(tmp_path, rope_scaling=LLAMA3)
    assert hash(config) == hash(load(tmp_path, rope_scaling=LLAMA3))
    with pytest.raises(AttributeError):
        config.vocab_size = 1


def test_missing_keys_have_the_defaults_of_transformers(tmp_path):
    """D66"""
    config = load(tmp_path, max_position_embeddings=MISSING)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.dtype) == (2048, 1e-6, "float32")
    assert config.rope == RopeConfig("default", theta=10000.0)
    assert (config.tie_word_embeddings, config.eos_token_ids, config.moe) == (False, frozenset(), None)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [MISSING, None])
def test_key_without_a_default_must_be_there(tmp_path, key, value):
    """D66"""
    refused(tmp_path, f"config.json: {key} must be an integer, but the key is missing", **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 0), ("vocab_size", "32"), ("num_hidden_layers", 1.5), ("num_attention_heads", True)],
)
def test_value_that_is_no_positive_integer_is_refused(tmp_path, key, value):
    refused(tmp_path, f"{key} must be an integer of at least 1, got {value!r}", **{key: value})


@pytest.mark.parametrize(
    ("model_type", "head_dim", "expected"),
    [
        ("llama", MISSING, 8),
        ("llama", None, 8),
        ("qwen2", MISSING, 8),
        ("qwen3", None, 8),
        ("qwen3", MISSING, 128),  # transformers' default for qwen3
        ("qwen3", 32, 32),
        ("qwen2", 32, 32),
    ],
)
def test_head_dim_missing_null_or_given(tmp_path, model_type, head_dim, expected):
    """D66"""
    assert load(tmp_path, model_type=model_type, head_dim=head_dim).head_dim == expected


def test_head_dim_that_does_not_follow_is_refused(tmp_path):
    refused(tmp_path, "hidden_size must be a multiple of num_attention_heads=6, got 64", num_attention_heads=6)


def test_odd_head_dim_is_refused(tmp_path):
    refused(tmp_path, "head_dim must be even .* got 5", head_dim=5)


@pytest.mark.parametrize(
    ("model_type", "given", "expected"),
    [("llama", MISSING, 8), ("llama", None, 8), ("qwen2", None, 8), ("qwen3", 4, 4)],
)
def test_kv_heads_missing_or_null_are_as_many_as_query_heads(tmp_path, model_type, given, expected):
    """D66"""
    assert load(tmp_path, model_type=model_type, num_key_value_heads=given).num_key_value_heads == expected


def test_kv_heads_that_do_not_divide_the_query_heads_are_refused(tmp_path):
    refused(tmp_path, "must be a multiple of num_key_value_heads=3, got 8", num_key_value_heads=3)


@pytest.mark.parametrize(
    ("model_type", "attention_bias", "expected"),
    [
        ("llama", MISSING, (False, False)),
        ("llama", True, (True, True)),
        ("qwen2", MISSING, (True, False)),
        ("qwen2", False, (True, False)),
        ("qwen3", True, (True, True)),
        ("qwen3", False, (False, False)),
    ],
)
def test_attention_biases_are_those_of_the_architecture(tmp_path, model_type, attention_bias, expected):
    """D64, D66"""
    config = load(tmp_path, model_type=model_type, attention_bias=attention_bias)
    assert (config.qkv_bias, config.o_bias) == expected


@pytest.mark.parametrize(("model_type", "expected"), [("llama", True), ("qwen2", False), ("qwen3", False)])
def test_only_llama_has_an_mlp_bias(tmp_path, model_type, expected):
    assert load(tmp_path, model_type=model_type, mlp_bias=True).mlp_bias == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_dtype_is_read_from_either_key(tmp_path, given, expected):
    """D66"""
    assert load(tmp_path, **given).dtype == expected


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "auto", 16])
def test_other_dtype_is_refused(tmp_path, dtype):
    refused(tmp_path, f"dtype must be one of .* got {dtype!r}", torch_dtype=dtype)


@pytest.mark.parametrize(
    ("in_config", "generation", "expected"),
    [
        (MISSING, None, set()),
        (None, {}, set()),
        (2, None, {2}),
        ([2, 3], None, {2, 3}),
        (2, {"eos_token_id": [5, 6]}, {5, 6}),
        (MISSING, {"eos_token_id": 7}, {7}),
        (2, {"eos_token_id": None}, set()),
        (2, {}, set()),
        (0, {"eos_token_id": 0}, {0}),
    ],
)
def test_generation_config_decides_which_ids_end_a_text(tmp_path, in_config, generation, expected):
    """D70, D91: all of its ids, or those of config.json if it does not exist."""
    assert load(tmp_path, generation, eos_token_id=in_config).eos_token_ids == expected


@pytest.mark.parametrize("eos", ["</s>", [1, None], True, 1.5])
@pytest.mark.parametrize("file_name", ["config.json", "generation_config.json"])
def test_end_of_sequence_id_that_is_no_integer_is_refused(tmp_path, file_name, eos):
    with pytest.raises(
        ValueError, match=rf"eos_token_id \({file_name}\) must be an integer or a list .* got "
    ) as caught:
        load(tmp_path, {"eos_token_id": eos} if "gen" in file_name else None, eos_token_id=eos)
    assert str(caught.value).endswith(repr(eos))


@pytest.mark.parametrize(("eos", "expected"), [(-1, set()), ([-1, 3], {3}), (32, set()), ([31, 32], {31})])
def test_end_of_sequence_id_outside_the_vocabulary_ends_nothing(tmp_path, eos, expected, caplog):
    """D89: such as -1, by which some mean that there is none. It is said once."""
    assert load(tmp_path, eos_token_id=eos).eos_token_ids == expected
    assert caplog.messages == [
        f"eos_token_id {eos!r} of config.json names ids outside the vocabulary (0 to 31): these end no text"
    ]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_beside_a_model_is_named_in_a_warning(tmp_path, name, caplog):
    """D95: its weights are not applied."""
    (tmp_path / name).write_text("{}")
    load(tmp_path)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path} holds a LoRA adapter ({name}), which is not applied: merge it")


def test_adapter_without_a_model_is_refused_with_the_remedy(tmp_path, caplog):
    """D95"""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a LoRA adapter \(adapter_config.json\) and no config.json: merge it"):
        load_model_config(tmp_path)
    assert caplog.messages == []


@pytest.mark.parametrize(("given", "expected"), [(MISSING, None), (None, None), ("LlamaTokenizer", "LlamaTokenizer")])
def test_tokenizer_class_is_read(tmp_path, given, expected):
    """D90"""
    assert load(tmp_path, tokenizer_class=given).tokenizer_class == expected


def test_tokenizer_class_that_is_no_name_is_refused(tmp_path):
    """D90"""
    refused(tmp_path, "config.json: tokenizer_class must be a string, got 3", tokenizer_class=3)


# Rope, in the old layout (rope_theta and rope_scaling) and the new one (rope_parameters).


def old_layout(parameters):
    theta = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
    rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return theta | {"rope_scaling": rest or None}


def old_layout_with_type(parameters):
    renamed = {("type" if key == "rope_type" else key): value for key, value in parameters.items()}
    return old_layout(renamed)


def new_layout(parameters):
    return {"rope_parameters": parameters}


LAYOUTS = pytest.mark.parametrize("layout", [old_layout, old_layout_with_type, new_layout])
YARN_ATTENTION = 1.1386294361119891  # 0.1 ln 4 + 1
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300}


@LAYOUTS
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
    """D65"""
    assert load(tmp_path, **layout(parameters)).rope == expected


@pytest.mark.parametrize("rope_type", ["yarn", "llama3"])
def test_length_trained_on_is_max_position_embeddings_unless_stated(tmp_path, rope_type):
    """As in transformers: a key of the config comes before one of the rope parameters."""
    parameters = {key: value for key, value in (LLAMA3 | {"rope_type": rope_type}).items() if "original" not in key}
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
        ({"rope_type": "yarn", "factor": 4.0}, 4000),
    ],
)
def test_longest_supported_sequence_follows_from_the_rope_type(tmp_path, parameters, expected):
    assert load(tmp_path, rope_scaling=parameters).max_supported_len == expected


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "mrope", "su", "proportional", 3])
@LAYOUTS
def test_unknown_rope_type_is_refused_by_name(tmp_path, layout, rope_type):
    """D65"""
    match = f"rope_type must be one of 'default', 'linear', 'llama3', 'yarn', got {rope_type!r}"
    refused(tmp_path, match, **layout({"rope_type": rope_type, "factor": 2.0}))


@pytest.mark.parametrize("factor", [MISSING, None, 0.5, "2", float("inf")])
@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_rope_scaling_needs_a_factor(tmp_path, rope_type, factor):
    parameters = LLAMA3 | {"rope_type": rope_type, "factor": factor}
    parameters = {key: value for key, value in parameters.items() if value is not MISSING}
    refused(tmp_path, "rope factor must be a number of at least 1, got", rope_scaling=parameters)


@pytest.mark.parametrize("key", ["low_freq_factor", "high_freq_factor"])
def test_llama3_needs_its_frequency_factors(tmp_path, key):
    parameters = {name: value for name, value in LLAMA3.items() if name != key}
    refused(tmp_path, f"{key} must be a number, but the key is missing", rope_scaling=parameters)


def test_llama3_frequency_factors_in_the_wrong_order_are_refused(tmp_path):
    refused(tmp_path, "high_freq_factor must be above low_freq_factor=4", rope_scaling=LLAMA3 | {"low_freq_factor": 4})


@pytest.mark.parametrize("where", ["config", "rope_scaling", "rope_parameters"])
def test_partial_rotary_embedding_is_refused(tmp_path, where):
    """D66"""
    partial = {"partial_rotary_factor": 0.5}
    refused(
        tmp_path, "partial_rotary_factor must be 1, got 0.5", **(partial if where == "config" else {where: partial})
    )


def test_whole_rotary_embedding_may_be_stated(tmp_path):
    parameters = {"partial_rotary_factor": 1.0, "rope_type": "default"}
    assert load(tmp_path, partial_rotary_factor=1.0, rope_parameters=parameters).rope == RopeConfig()


def test_rope_parameters_per_layer_type_are_refused(tmp_path):
    """D65"""
    parameters = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    match = "per-layer rope parameters are not supported, got some for full_attention, sliding_attention"
    refused(tmp_path, match, rope_parameters=parameters)


@pytest.mark.parametrize("key", ["attn_factor", "extrapolation_factor", "finetuned"])
def test_rope_parameter_that_transformers_passes_over_is_named_in_a_warning(tmp_path, key, caplog):
    """D89"""
    assert load(tmp_path, rope_scaling=YARN | {key: 2}).rope == load(tmp_path, rope_scaling=YARN).rope
    (message,) = caplog.messages
    assert message.startswith(f"config.json: rope parameter {key}=2 is not applied, as in transformers: ")


def test_unknown_rope_parameter_is_refused_by_name(tmp_path):
    """D65: such as mrope_section, which changes what positions are."""
    refused(tmp_path, "rope parameters must be among .* got mrope_section", rope_scaling={"mrope_section": [1, 2]})


# What is not supported is refused by name.


@pytest.mark.parametrize("model_type", ["mistral", "gemma3", "qwen3_next", "", None, 3, ["llama"]])
def test_other_architecture_is_refused_with_what_is_supported(tmp_path, model_type):
    """D63"""
    refused(tmp_path, "model_type must be one of llama, qwen2, qwen3, qwen3_moe .* got", model_type=model_type)


@pytest.mark.parametrize("architectures", [["LlamaForSequenceClassification"], ["Qwen3Model"], [3]])
def test_other_task_is_refused_with_what_is_supported(tmp_path, architectures):
    """D63"""
    match = "architectures of a llama checkpoint must contain 'LlamaForCausalLM'.*supports .*Qwen3MoeForCausalLM"
    refused(tmp_path, match, architectures=architectures)


@pytest.mark.parametrize("architectures", [MISSING, None, [], ["LlamaForCausalLM"], ["LlamaModel"]])
def test_architectures_may_be_missing_or_the_base_model(tmp_path, architectures):
    assert load(tmp_path, architectures=architectures).model_type == "llama"


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes"])
def test_quantised_checkpoint_is_refused_by_method(tmp_path, method):
    """D63"""
    refused(
        tmp_path, rf"quantization_config \({method}\) is not supported", quantization_config={"quant_method": method}
    )


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}),
        ("llama", {"use_sliding_window": True, "sliding_window": 128}),
        ("qwen3_moe", MOE | {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 99}),
    ],
)
def test_sliding_window_in_use_is_refused(tmp_path, model_type, changes):
    """D66"""
    refused(tmp_path, "sliding.window", **(changes | {"model_type": model_type}))


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["full_attention"] * 4},
        {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    ],
)
def test_sliding_window_that_is_not_in_use_is_no_obstacle(tmp_path, changes):
    assert load(tmp_path, model_type="qwen2", **changes).model_type == "qwen2"


@pytest.mark.parametrize("hidden_act", ["silu", "swish", MISSING])
def test_both_names_of_silu_are_known(tmp_path, hidden_act):
    """D89"""
    assert load(tmp_path, hidden_act=hidden_act).model_type == "llama"


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "hardswish", None])
def test_other_activation_is_refused(tmp_path, hidden_act):
    """D66"""
    refused(tmp_path, f"hidden_act must be 'silu' .* got {hidden_act!r}", hidden_act=hidden_act)


# Mixture of experts.


def test_experts_are_read(tmp_path):
    moe = load(tmp_path, **MOE, norm_topk_prob=True).moe
    assert moe == MoEConfig(8, 2, 32, norm_topk_prob=True, layers=frozenset({0, 1, 2, 3}))


@pytest.mark.parametrize(
    "counts",
    [
        {"num_experts": 8},
        {"num_experts": MISSING, "num_local_experts": 8},
        {"num_experts": 8, "num_local_experts": 8},
    ],
)
def test_number_of_experts_is_read_from_either_key(tmp_path, counts):
    moe = load(tmp_path, **(MOE | counts)).moe
    assert moe is not None
    assert (moe.num_experts, moe.norm_topk_prob) == (8, False)


@pytest.mark.parametrize("counts", [{"num_experts": MISSING}, {"num_local_experts": 4}])
def test_number_of_experts_must_be_given_once(tmp_path, counts):
    refused(tmp_path, r"num_experts \(or num_local_experts\) must be given, and once", **(MOE | counts))


@pytest.mark.parametrize(
    ("mlp_only_layers", "decoder_sparse_step", "expected"),
    [([], 1, {0, 1, 2, 3}), ([0, 3], 1, {1, 2}), ([], 2, {1, 3}), ([1], 2, {3}), (None, 3, {2})],
)
def test_sparse_layers_follow_from_step_and_exceptions(tmp_path, mlp_only_layers, decoder_sparse_step, expected):
    changes = {"mlp_only_layers": mlp_only_layers, "decoder_sparse_step": decoder_sparse_step}
    moe = load(tmp_path, **MOE, **changes).moe
    assert moe is not None
    assert moe.layers == expected


@pytest.mark.parametrize("changes", [{"num_experts": 0}, {"mlp_only_layers": [0, 1, 2, 3]}, {"decoder_sparse_step": 9}])
def test_model_without_a_sparse_layer_is_dense(tmp_path, changes):
    assert load(tmp_path, **(MOE | changes)).moe is None


def test_more_chosen_experts_than_there_are_is_refused(tmp_path):
    refused(tmp_path, "num_experts_per_tok must be an integer from 1 to 8, got 9", **(MOE | {"num_experts_per_tok": 9}))


@pytest.mark.parametrize("key", ["num_experts_per_tok", "moe_intermediate_size"])
def test_missing_expert_key_is_named(tmp_path, key):
    refused(tmp_path, f"{key} must be an integer, but the key is missing", **(MOE | {key: MISSING}))


# Files.


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model must be a directory that exists, got .*nowhere"):
        load_model_config(tmp_path / "nowhere")


def test_missing_config_is_named(tmp_path):
    with pytest.raises(ValueError, match="must hold a config"):
        load_model_config(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[1]", b"null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_file_is_named(tmp_path, name, content):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} must (be a JSON file that can be read|hold a JSON object)"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("key", ["architectures", "layer_types", "mlp_only_layers"])
def test_list_that_is_none_is_named(tmp_path, key):
    refused(tmp_path, f"{key} must be a list, got 5", **(MOE | {key: 5}))
