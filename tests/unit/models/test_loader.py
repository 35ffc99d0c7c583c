"""The loader: what is wrong with a checkpoint is an error that names it; shards of ranks, and files.

e2e/test_checkpoint_forms.py and test_hugging_face.py compare the logits of every form that is right with transformers.
"""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import save_file

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.torch_ops import TORCH_OPS
from nanovllm.models.decoder import build_model
from nanovllm.models.loader import INDEX_FILE, SINGLE_FILE, load_model
from tests.support.checkpoints import checkpoint_tensors, small_config

CONFIG, TIED, MOE = small_config(), small_config(tie_word_embeddings=True), small_config("qwen3_moe")
CHECKPOINT, MOE_CHECKPOINT = checkpoint_tensors(CONFIG), checkpoint_tensors(MOE)
V, E, F = CONFIG.vocab_size, CONFIG.hidden_size, CONFIG.intermediate_size
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write(directory, tensors, num_shards=1):
    """One file, or two shards with their index, over which the names are dealt in turns."""
    if num_shards == 1:
        save_file(tensors, directory / SINGLE_FILE)
        return
    weight_map = {}
    for first in (0, 1):
        file_name = f"model-{first + 1:05}-of-00002.safetensors"
        names = sorted(tensors)[first::2]
        save_file({name: tensors[name] for name in names}, directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    write_index(directory, weight_map)


def write_index(directory, weight_map):
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def loaded(directory, config=CONFIG, tp=SINGLE_RANK):
    model = build_model(config, TORCH_OPS, tp)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    load_model(model, directory, use_tqdm=False)
    assert [name for name, parameter in model.named_parameters() if parameter.isnan().any()] == [], "not loaded"
    return dict(model.named_parameters())


def refused(directory, match, config=CONFIG):
    with pytest.raises(ValueError, match=match) as caught:
        loaded(directory, config)
    return str(caught.value)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def fused(tensors):
    """The experts of each layer in one tensor, as transformers 5 holds them in memory."""
    own = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    gates, ups, downs = (
        [tensors[f"{EXPERTS}.{expert}.{name}_proj.weight"] for expert in range(3)] for name in ("gate", "up", "down")
    )
    gate_up = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    return own | {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.down_proj": torch.stack(downs)}


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_loads_its_shard(tmp_path, rank):
    """D89: of experts in one tensor the same as of experts one by one."""
    tp = TensorParallel(rank, 2)
    write(tmp_path, MOE_CHECKPOINT)
    parameters = loaded(tmp_path, MOE, tp)
    assert torch.equal(parameters[LM_HEAD], MOE_CHECKPOINT[LM_HEAD].chunk(2)[rank])
    write(tmp_path, fused(MOE_CHECKPOINT))
    of_fused = loaded(tmp_path, MOE, tp)
    assert of_fused.keys() == parameters.keys()
    assert [name for name in parameters if not torch.equal(of_fused[name], parameters[name])] == []


# Wrong tensors: id -> (changes of the checkpoint, None for a tensor that is missing; what the message must say).

UP_PROJ = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts"
MISSING = [
    "model.norm.weight",
    LM_HEAD,
    "model.layers.1.self_attn.k_proj.weight",  # one part of a packed parameter
    "model.layers.0.self_attn.v_proj.bias",  # another layer has it
    f"{EXPERTS}.2.up_proj.weight",
]
UNEXPECTED = [
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.0.mlp.gate_up_proj.weight",  # contains "up_proj"
    "model.layers.0.self_attn.xq_proj.weight",
    f"{UP_PROJ}.weight.extra",
    "layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight",
    "model.layers.0.self_attn.o_proj.bias",
    "model.layers.0.self_attn.bias",  # a causal mask in other architectures
    "model.layers.0.self_attn.xrotary_emb.inv_freq",
    "model.layers.0.mlp.experts.gate_up_proj",
]
MISSHAPEN = [
    (f"{UP_PROJ}.weight", [F, E], [E, F]),  # layers/test_parameter.py has the other parameters
    (f"{EXPERTS}.gate_up_proj", [3, 8, 10], [3, 8, 9]),
    (f"{EXPERTS}.gate_up_proj", [3, 8, 10], [2, 8, 10]),
    (f"{EXPERTS}.gate_up_proj", [3, 8, 10], [3, 7, 10]),
    (f"{EXPERTS}.down_proj", [3, 10, 4], [3, 4, 10]),
]
QUANTISED = ["qweight", "scales", "qzeros", "g_idx", "weight_scale_inv", "weight_packed"]
DTYPES = [torch.int8, torch.bool, torch.float8_e4m3fn]
WRONG = (
    {f"missing {name}": ({name: None}, rf"lacks weights of this model \(1\): {name}$") for name in MISSING}
    | {name: ({name: torch.ones(1)}, rf"has weights that this model does not \(1\): {name}$") for name in UNEXPECTED}
    | {
        f"{name} {given}": (
            {name: torch.ones(given)},
            rf"other shapes than config.json implies .*{name}: expected shape {re.escape(f'{right}, got {given}')}",
        )
        for name, right, given in MISSHAPEN
    }
    | {
        suffix: ({f"{UP_PROJ}.{suffix}": torch.ones(2, 2)}, rf"quantised weights .* \(1\): {UP_PROJ}.{suffix}$")
        for suffix in QUANTISED
    }
    | {
        str(dtype): ({"model.norm.weight": torch.ones(E).to(dtype)}, f"weights must be float64.* got {str(dtype)[6:]}")
        for dtype in DTYPES
    }
)


@pytest.mark.parametrize(("changes", "match"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensor_is_named(tmp_path, changes, match, caplog):
    """D60, D61, D62, D63, D89: names match as a whole, nothing is broadcast, all experts may be one tensor."""
    is_fused = any(name.startswith(EXPERTS) and name.endswith("_proj") for name in changes)
    tensors = (fused(MOE_CHECKPOINT) if is_fused else MOE_CHECKPOINT) | changes
    write(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    refused(tmp_path, match, MOE)
    assert caplog.messages == []


def test_all_wrong_tensors_are_counted_and_the_first_ten_listed(tmp_path):
    """D60, D62"""
    write(tmp_path, {name: tensor[..., None] for name, tensor in CHECKPOINT.items()})
    refused(tmp_path, rf"implies \({len(CHECKPOINT)}\): lm_head.weight: .* and {len(CHECKPOINT) - 10} more$")


def test_biases_that_no_layer_has_are_named_if_more_is_missing(tmp_path, caplog):
    """D89, D60: alone they are zero, with a warning."""
    missing = [*(f"model.layers.{layer}.self_attn.q_proj.bias" for layer in (0, 1)), "model.norm.weight"]
    write(tmp_path, without(CHECKPOINT, *missing))
    refused(tmp_path, rf"lacks weights of this model \(3\): {'; '.join(missing)}$")
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached"])
def test_unused_buffer_is_ignored(tmp_path, name):
    """D89"""
    write(tmp_path, CHECKPOINT | {name: torch.ones(3), "model.layers.1.self_attn.masked_bias": torch.ones(3)})
    loaded(tmp_path)


def test_tensors_that_are_stored_twice_are_named(tmp_path):
    """D60, D89: nothing says which of them is valid."""
    write(tmp_path, MOE_CHECKPOINT | fused(MOE_CHECKPOINT))
    refused(tmp_path, r"has weights that this model does not \(9\): model.layers.1.mlp.experts.0.down_proj", MOE)
    save_file({LM_HEAD: torch.ones(V, E)}, tmp_path / "second.safetensors")
    write_index(
        tmp_path, {"a": (tmp_path / SINGLE_FILE).rename(tmp_path / "first.safetensors").name, "b": "second.safetensors"}
    )
    refused(tmp_path, r"several files hold the same weight \(1\): lm_head.weight \(first.safetensors and second", MOE)


# Tied weights.


def test_tied_checkpoint_needs_one_of_the_tensors(tmp_path):
    """D67, D80"""
    write(tmp_path, without(CHECKPOINT, EMBEDDING, LM_HEAD))
    refused(tmp_path, rf"lacks .* \(1\): {EMBEDDING}", TIED)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_tied_checkpoint_may_hold_both_tensors_if_they_are_equal(tmp_path, num_shards, caplog):
    """D67, D80: equal in the dtype of the model; they are one Parameter then."""
    write(tmp_path, CHECKPOINT | {LM_HEAD: CHECKPOINT[EMBEDDING].double() * (1 + 1e-12)}, num_shards)
    parameters = loaded(tmp_path, TIED)
    assert LM_HEAD not in parameters
    assert torch.equal(parameters[EMBEDDING], CHECKPOINT[EMBEDDING])
    assert caplog.messages == []


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("row", [0, V - 1])
def test_weights_that_differ_are_not_tied_on_any_rank(tmp_path, row, num_shards, caplog):
    """D80: each rank compares the whole tensors, so a rank whose rows are equal decides as the others; rank 0 warns."""
    tensors = CHECKPOINT | {LM_HEAD: CHECKPOINT[EMBEDDING].clone()}
    tensors[LM_HEAD][row] += 1
    write(tmp_path, tensors, num_shards)
    assert torch.equal(loaded(tmp_path, TIED)[LM_HEAD], tensors[LM_HEAD])
    assert loaded(tmp_path, small_config(tie_word_embeddings=True, dtype="bfloat16"))[LM_HEAD].dtype == torch.bfloat16
    assert [message[:50] for message in caplog.messages] == 2 * ["config.json ties lm_head.weight to model.embed_tok"]
    caplog.clear()
    for rank in (1, 0):
        assert caplog.messages == []
        parameters = loaded(tmp_path, TIED, TensorParallel(rank, 2))
        assert torch.equal(parameters[LM_HEAD], tensors[LM_HEAD].chunk(2)[rank])
        assert torch.equal(parameters[EMBEDDING], tensors[EMBEDDING].chunk(2)[rank])
    assert len(caplog.messages) == 1


def test_head_of_another_shape_is_refused_also_if_tied(tmp_path):
    """D80, D62"""
    write(tmp_path, CHECKPOINT | {LM_HEAD: torch.ones(V + 1, E)})
    refused(tmp_path, r"lm_head.weight: expected shape \[20, 10\], got \[21, 10\]", TIED)


# Files.


@pytest.mark.parametrize(
    "entry",
    [
        *("../outside.safetensors", "/etc/outside.safetensors", "sub/outside.safetensors", "./x.safetensors"),
        *("..", "", "..\\x.safetensors", "C:\\x.safetensors", "model.bin"),
    ],
)
def test_index_that_names_files_elsewhere_is_refused(tmp_path, entry):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for reachable in ("../outside.safetensors", "sub/outside.safetensors"):
        save_file(CHECKPOINT, directory / reachable)
    write_index(directory, dict.fromkeys(CHECKPOINT, entry))
    assert repr(entry).strip("'") in repr(refused(directory, "names files outside its directory"))


def test_symbolic_links_are_followed(tmp_path):
    """The hub's cache consists of links to files elsewhere: names are judged as text."""
    blobs, directory = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    directory.mkdir()
    write(blobs, CHECKPOINT, num_shards=2)
    for number, blob in enumerate(sorted(blobs.iterdir())):
        hashed = blob.rename(blobs / f"{number}")
        (directory / blob.name).symlink_to(hashed)
    loaded(directory)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_broken_index_is_named(tmp_path, content):
    (tmp_path / INDEX_FILE).write_text(content)
    refused(tmp_path, rf"{INDEX_FILE} must be JSON with a weight_map")


def test_broken_or_missing_shard_is_named(tmp_path):
    """D60: for instance after a download that was interrupted."""
    write(tmp_path, CHECKPOINT, num_shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    refused(tmp_path, rf"{shard.name} must be a safetensors file that can be read")
    shard.unlink()
    refused(tmp_path, rf"names shards that are missing \(1\): {shard.name}$")


def test_directory_without_safetensors_says_what_it_must_hold(tmp_path):
    """D60: pickled weights are named, and not read."""
    refused(tmp_path, f"must hold {SINGLE_FILE} or {INDEX_FILE}, and there is neither")
    torch.save(CHECKPOINT, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "only pytorch_model.bin, which can run code when read; .* to safetensors")
    write(tmp_path, CHECKPOINT, num_shards=2)
    (tmp_path / INDEX_FILE).unlink()
    refused(tmp_path, rf"there is only model-00001-of-00002.safetensors, .*; download {INDEX_FILE}, or rename")


@pytest.mark.parametrize("use_tqdm", [False, True])
def test_progress_and_callback_count_every_tensor(tmp_path, capsys, monkeypatch, use_tqdm):
    write(tmp_path, CHECKPOINT)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    calls = []
    load_model(build_model(CONFIG, TORCH_OPS), tmp_path, use_tqdm, lambda: calls.append(1))
    shown = f"Loading weights: {len(CHECKPOINT)}/{len(CHECKPOINT)} 100%|██████" in capsys.readouterr().err
    assert (shown, len(calls)) == (use_tqdm, len(CHECKPOINT))
