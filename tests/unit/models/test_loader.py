"""The loader: every tensor in its place exactly once, or an error that names what is wrong.

It is one file of over 300 lines because each kind of broken checkpoint has its test, and all write theirs alike.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.models.decoder import build_model
from nanovllm.models.loader import INDEX_FILE, SINGLE_FILE, load_model
from tests.support.checkpoints import checkpoint_tensors, small_config
from tests.support.counts import count_comparisons

CONFIG = small_config()
MOE_CONFIG = small_config("qwen3_moe")
V, E, F = CONFIG.vocab_size, CONFIG.hidden_size, CONFIG.intermediate_size
Q = CONFIG.num_attention_heads * CONFIG.head_dim


def checkpoint(config=CONFIG):
    return checkpoint_tensors(config)


def write(directory, *shards):
    """One file, or shards with their index."""
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE_FILE)
        return
    weight_map = {}
    for number, tensors in enumerate(shards):
        file_name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
    write_index(directory, weight_map)


def write_index(directory, weight_map):
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def halves(tensors):
    names = sorted(tensors)
    return {name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]}


def loaded(directory, config=CONFIG, tp=SINGLE_RANK):
    model = build_model(config, TORCH_OPS, tp)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)  # what is not loaded shows
    load_model(model, directory, use_tqdm=False)
    return dict(model.named_parameters())


def refused(directory, match, config=CONFIG):
    with pytest.raises(ValueError, match=match) as caught:
        loaded(directory, config)
    return str(caught.value)


def expected_parameters(tensors):
    """The packed parameters, put together by hand."""
    expected = {name: tensor for name, tensor in tensors.items() if "_proj" not in name or "o_proj" in name}
    for layer in ("model.layers.0", "model.layers.1"):
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{attention}.{name}_proj.{kind}"] for name in "qkv"]
            expected[f"{attention}.qkv_proj.{kind}"] = torch.cat(parts)
        if f"{mlp}.gate.weight" not in tensors:
            parts = [tensors[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]
            expected[f"{mlp}.gate_up_proj.weight"] = torch.cat(parts)
            expected[f"{mlp}.down_proj.weight"] = tensors[f"{mlp}.down_proj.weight"]
            continue
        experts = [f"{mlp}.experts.{expert}" for expert in range(3)]
        gate_up = [torch.cat([tensors[f"{e}.gate_proj.weight"], tensors[f"{e}.up_proj.weight"]]) for e in experts]
        expected[f"{mlp}.experts.gate_up_proj.weight"] = torch.stack(gate_up)
        downs = [tensors[f"{expert}.down_proj.weight"] for expert in experts]
        expected[f"{mlp}.experts.down_proj.weight"] = torch.stack(downs)
    return expected


def assert_same(parameters, expected):
    assert parameters.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(parameters[name], expected[name])] == []
    count_comparisons("loader: parameters against tensors packed by hand", len(expected))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_every_tensor_is_loaded_into_its_place(tmp_path, num_shards):
    """D60"""
    tensors = checkpoint()
    write(tmp_path, *([tensors] if num_shards == 1 else halves(tensors)))
    assert_same(loaded(tmp_path), expected_parameters(tensors))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_experts_are_packed(tmp_path, num_shards):
    """D60"""
    tensors = checkpoint(MOE_CONFIG)
    write(tmp_path, *([tensors] if num_shards == 1 else halves(tensors)))
    assert_same(loaded(tmp_path, MOE_CONFIG), expected_parameters(tensors))


def fused(tensors):
    """The experts of each layer in one tensor, as transformers 5 holds them in memory."""
    own = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    expected = expected_parameters(tensors)
    return own | {name.removesuffix(".weight"): tensor for name, tensor in expected.items() if ".experts." in name}


@pytest.mark.parametrize("num_shards", [1, 2])
def test_experts_may_be_stored_in_one_tensor(tmp_path, num_shards):
    """D89"""
    tensors = checkpoint(MOE_CONFIG)
    write(tmp_path, *([fused(tensors)] if num_shards == 1 else halves(fused(tensors))))
    assert_same(loaded(tmp_path, MOE_CONFIG), expected_parameters(tensors))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_loads_its_share_of_experts_in_one_tensor(tmp_path, rank):
    """D89: of the gate and of the up matrix, the same as of experts one by one."""
    tensors = checkpoint(MOE_CONFIG)
    write(tmp_path, tensors)
    expected = loaded(tmp_path, MOE_CONFIG, TensorParallel(rank, 2))
    write(tmp_path, fused(tensors))
    assert_same(loaded(tmp_path, MOE_CONFIG, TensorParallel(rank, 2)), expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gate_up_proj", (3, 8, 9)),
        ("gate_up_proj", (2, 8, 10)),
        ("gate_up_proj", (3, 7, 10)),
        ("down_proj", (3, 4, 10)),
    ],
)
def test_misshapen_experts_in_one_tensor_are_named_with_both_shapes(tmp_path, name, shape):
    """D89, D62"""
    right = [3, 8, 10] if name == "gate_up_proj" else [3, 10, 4]
    name = f"model.layers.1.mlp.experts.{name}"
    write(tmp_path, fused(checkpoint(MOE_CONFIG)) | {name: torch.ones(shape)})
    message = refused(tmp_path, "other shapes than config.json implies", MOE_CONFIG)
    assert f"{name}: expected shape {right}, got {list(shape)}" in message


def test_experts_in_one_tensor_and_one_by_one_are_refused(tmp_path):
    """D89, D60: it is not certain which count."""
    tensors = checkpoint(MOE_CONFIG)
    write(tmp_path, tensors | fused(tensors))
    refused(tmp_path, r"has weights that this model does not \(9\): model.layers.1.mlp.experts.0.down_proj", MOE_CONFIG)


def test_names_without_prefix_are_those_of_a_base_model(tmp_path):
    """D89: all names, or none."""
    tensors = checkpoint()
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write(tmp_path, stripped)
    assert_same(loaded(tmp_path), expected_parameters(tensors))
    write(tmp_path, stripped | {"norm.weight": tensors["model.norm.weight"], "model.norm.weight": torch.ones(E)})
    refused(tmp_path, "the checkpoint lacks weights")


def test_bias_that_no_layer_has_is_zero(tmp_path, caplog):
    """D89: here q's; those of k and v, packed with it, are loaded."""
    tensors = checkpoint()
    names = [f"model.layers.{layer}.self_attn.q_proj.bias" for layer in (0, 1)]
    write(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in names})
    zero = {name: torch.zeros_like(tensors[name]) for name in names}
    assert_same(loaded(tmp_path), expected_parameters(tensors | zero))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("also_missing", [[], ["model.layers.1.self_attn.q_proj.bias", "model.norm.weight"]])
def test_missing_bias_is_named_if_another_layer_has_it_or_more_is_missing(tmp_path, also_missing, caplog):
    """D89, D60"""
    tensors = checkpoint()
    missing = ["model.layers.0.self_attn.q_proj.bias", *also_missing]
    write(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in missing})
    refused(tmp_path, rf"lacks weights of this model \({len(missing)}\): {'; '.join(missing)}$")
    assert caplog.messages == []


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_loads_its_share(tmp_path, rank):
    tensors = checkpoint()
    write(tmp_path, tensors)
    parameters = loaded(tmp_path, tp=TensorParallel(rank, 2))
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(parameters["model.layers.0.mlp.down_proj.weight"], down.chunk(2, dim=1)[rank])
    assert torch.equal(parameters["lm_head.weight"], tensors["lm_head.weight"].chunk(2)[rank])
    assert torch.equal(parameters["model.norm.weight"], tensors["model.norm.weight"])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_cast_to_the_models_dtype(tmp_path, stored, dtype):
    tensors = {name: tensor.to(stored) for name, tensor in checkpoint().items()}
    write(tmp_path, tensors)
    weight = loaded(tmp_path, small_config(dtype=dtype))["model.norm.weight"]
    assert torch.equal(weight, tensors["model.norm.weight"].to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.k_proj.weight",  # one part of a packed parameter
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.1.mlp.up_proj.weight",
    ],
)
def test_missing_tensor_is_named(tmp_path, name):
    """D60"""
    tensors = checkpoint()
    del tensors[name]
    write(tmp_path, tensors)
    refused(tmp_path, rf"lacks weights of this model \(1\): {name}$")


def test_missing_expert_is_named(tmp_path):
    """D60"""
    tensors = checkpoint(MOE_CONFIG)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    write(tmp_path, tensors)
    match = r"lacks .* \(1\): model.layers.1.mlp.experts.2.up_proj.weight$"
    refused(tmp_path, match, MOE_CONFIG)


def test_long_list_of_missing_tensors_is_cut_with_its_length(tmp_path):
    write(tmp_path, {"model.norm.weight": torch.ones(E)})
    num_missing = len(checkpoint()) - 1
    refused(tmp_path, rf"\({num_missing}\): lm_head.weight; .* and {num_missing - 10} more$")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",  # D61: contains "up_proj"
        "model.layers.0.self_attn.xq_proj.weight",  # D61
        "model.layers.0.mlp.up_proj.weight.extra",
        "layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.self_attn.bias",  # a causal mask in other architectures
        "model.layers.0.self_attn.xrotary_emb.inv_freq",
        "model.layers.0.mlp.experts.gate_up_proj",
    ],
)
def test_unexpected_tensor_is_named(tmp_path, name):
    """D61: names match as a whole."""
    write(tmp_path, checkpoint() | {name: torch.ones(1)})
    refused(tmp_path, rf"has weights that this model does not \(1\): {name}$")


def test_tensor_in_two_shards_is_named(tmp_path):
    """D60"""
    first, second = halves(checkpoint())
    write(tmp_path, first, second | {"lm_head.weight": torch.ones(V, E)})
    refused(tmp_path, r"several files hold the same weight \(1\): lm_head.weight \(model-00001-.*00002-of")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (1,)),
        ("model.layers.0.self_attn.k_proj.bias", (1,)),
        ("model.layers.0.self_attn.k_proj.weight", (Q, E)),
        ("model.layers.0.mlp.up_proj.weight", (E, F)),
        ("lm_head.weight", (V + 1, E)),
    ],
)
def test_misshapen_tensor_is_named_with_both_shapes(tmp_path, name, shape):
    """D62: nothing is broadcast."""
    tensors = checkpoint()
    right = list(tensors[name].shape)
    tensors[name] = torch.ones(shape)
    write(tmp_path, tensors)
    message = refused(tmp_path, "other shapes than config.json implies")
    assert f"{name}: expected shape {right}, got {list(shape)}" in message


def test_all_misshapen_tensors_are_listed(tmp_path):
    """D62"""
    write(tmp_path, {name: tensor[..., None] for name, tensor in checkpoint().items()})
    refused(tmp_path, rf"implies \({len(checkpoint())}\): ")


TIED = small_config(tie_word_embeddings=True)
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("stored", [EMBEDDING, LM_HEAD])
def test_tied_checkpoint_needs_one_of_the_tensors(tmp_path, stored):
    """D67, D80"""
    tensors = checkpoint()
    del tensors[LM_HEAD if stored == EMBEDDING else EMBEDDING]
    write(tmp_path, tensors)
    parameters = loaded(tmp_path, TIED)
    assert LM_HEAD not in parameters
    assert torch.equal(parameters[EMBEDDING], tensors[stored])
    del tensors[stored]
    write(tmp_path, tensors)
    refused(tmp_path, rf"lacks .* \(1\): {EMBEDDING}", TIED)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_tied_checkpoint_may_hold_both_tensors_if_they_are_equal(tmp_path, num_shards, caplog):
    """D67, D80: equal in the dtype of the model; they are one Parameter then."""
    tensors = checkpoint()
    tensors[LM_HEAD] = tensors[EMBEDDING].double() + 1e-12
    write(tmp_path, *([tensors] if num_shards == 1 else halves(tensors)))
    parameters = loaded(tmp_path, TIED)
    assert LM_HEAD not in parameters
    assert torch.equal(parameters[EMBEDDING], tensors[EMBEDDING])
    assert caplog.messages == []


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("row", [0, V - 1])
def test_weights_that_differ_are_not_tied_on_any_rank(tmp_path, row, num_shards, caplog):
    """D80: each rank compares the whole tensors, so those whose rows are equal decide as the others; rank 0 warns."""
    tensors = checkpoint()
    tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    tensors[LM_HEAD][row] += 1
    write(tmp_path, *([tensors] if num_shards == 1 else halves(tensors)))
    assert_same(loaded(tmp_path, TIED), expected_parameters(tensors))
    assert [message[:50] for message in caplog.messages] == ["config.json ties lm_head.weight to model.embed_tok"]
    caplog.clear()
    for rank in (1, 0):
        assert caplog.messages == []
        parameters = loaded(tmp_path, TIED, TensorParallel(rank, 2))
        assert torch.equal(parameters[LM_HEAD], tensors[LM_HEAD].chunk(2)[rank])
        assert torch.equal(parameters[EMBEDDING], tensors[EMBEDDING].chunk(2)[rank])
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_untied_head_has_the_dtype_of_the_model(tmp_path, dtype):
    """D80"""
    write(tmp_path, checkpoint())
    parameters = loaded(tmp_path, small_config(tie_word_embeddings=True, dtype=dtype))
    assert parameters[LM_HEAD].dtype == parameters[EMBEDDING].dtype == getattr(torch, dtype)


def test_head_of_another_shape_is_refused_also_if_tied(tmp_path):
    """D80, D62"""
    write(tmp_path, checkpoint() | {LM_HEAD: torch.ones(V + 1, E)})
    refused(tmp_path, r"lm_head.weight: expected shape \[20, 10\], got \[21, 10\]", TIED)


@pytest.mark.parametrize(
    "name",
    [
        "rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.sin_cached",
        "model.layers.1.self_attn.masked_bias",
    ],
)
def test_unused_buffers_are_passed_over(tmp_path, name):
    """D89"""
    tensors = checkpoint()
    write(tmp_path, tensors | {name: torch.ones(3)})
    assert_same(loaded(tmp_path), expected_parameters(tensors))


@pytest.mark.parametrize("suffix", ["qweight", "scales", "qzeros", "g_idx", "weight_scale_inv", "weight_packed"])
def test_quantised_weights_are_refused_by_name(tmp_path, suffix):
    """D63"""
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    write(tmp_path, checkpoint() | {name: torch.ones(2, 2)})
    refused(tmp_path, rf"quantised weights are not supported \(1\): {name}$")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weight_that_is_no_plain_float_is_refused(tmp_path, dtype):
    """D63"""
    write(tmp_path, checkpoint() | {"model.norm.weight": torch.ones(E).to(dtype)})
    refused(tmp_path, f"model.norm.weight in .*weights must be float64, .* got {str(dtype).removeprefix('torch.')}")


def test_missing_shard_is_named(tmp_path):
    """D60"""
    write(tmp_path, *halves(checkpoint()))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, r"names shards that are missing \(1\): model-00002-of-00002.safetensors$")


@pytest.mark.parametrize(
    "entry",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "..",
        "",
        "sub/outside.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "./x.safetensors",
        "model.bin",
    ],
)
def test_index_that_names_files_elsewhere_is_refused(tmp_path, entry):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    write(directory, *halves(checkpoint()))
    for reachable in ("../outside.safetensors", "sub/outside.safetensors"):
        save_file(checkpoint(), directory / reachable)
    write_index(directory, dict.fromkeys(checkpoint(), entry))
    assert repr(entry).strip("'") in repr(refused(directory, "names files outside its directory"))


def test_symbolic_links_are_followed(tmp_path):
    """The hub's cache consists of links to files elsewhere: names are judged as text."""
    blobs, directory = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    directory.mkdir()
    tensors = checkpoint()
    write(blobs, *halves(tensors))
    for number, blob in enumerate(sorted(blobs.iterdir())):
        hashed = blob.rename(blobs / f"{number}")
        (directory / blob.name).symlink_to(hashed)
    assert_same(loaded(directory), expected_parameters(tensors))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_broken_index_is_named(tmp_path, content):
    (tmp_path / INDEX_FILE).write_text(content)
    refused(tmp_path, rf"{INDEX_FILE} must be JSON with a weight_map")


def test_broken_file_is_named(tmp_path):
    """D60: such as a download that was cut off."""
    write(tmp_path, checkpoint())
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, rf"{SINGLE_FILE} must be a safetensors file that can be read")


def test_pickled_weights_are_refused_by_name(tmp_path):
    """D60: nothing but safetensors is read."""
    torch.save(checkpoint(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "only pytorch_model.bin, which can run code when read; .* to safetensors")


def test_directory_without_weights_says_what_it_must_hold(tmp_path):
    """D60"""
    refused(tmp_path, f"must hold {SINGLE_FILE} or {INDEX_FILE}, and there is neither")


@pytest.mark.parametrize("use_tqdm", [False, True])
def test_progress_is_shown_on_a_terminal_only(tmp_path, capsys, monkeypatch, use_tqdm):
    import sys

    write(tmp_path, checkpoint())
    model = build_model(CONFIG, TORCH_OPS)
    load_model(model, tmp_path, use_tqdm=use_tqdm)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    load_model(model, tmp_path, use_tqdm=use_tqdm)
    shown = capsys.readouterr().err
    assert (f"Loading weights: {len(checkpoint())}/{len(checkpoint())} 100%|██████" in shown) == use_tqdm
