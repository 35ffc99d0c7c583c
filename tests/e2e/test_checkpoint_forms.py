"""Checkpoints in forms that transformers accepts beside the usual one: the same logits as there, in float32 on the CPU.

Each is made from a tiny random model. The logits, and their bound, are those of test_hugging_face.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nanovllm.models.registry import load_model_config
from tests.e2e.test_hugging_face import check_logits
from tests.support.counts import count_comparisons
from tests.support.tiny_models import ABSENT, ROPE, VOCAB_SIZE, copy_model, tiny_model

Tensors = dict[str, torch.Tensor]
Form = Callable[[Path], Path]  # writes a checkpoint into a directory and returns where
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def copy_of(
    architecture: str,
    edit: Callable[[Tensors], object] | None = None,
    config: dict[str, Any] | None = None,
    **variant: Any,
) -> Form:
    """A tiny model's copy: its tensors changed by `edit`, its config.json by `config`."""

    def write(directory: Path) -> Path:
        model_dir = copy_model(tiny_model(architecture, **variant), directory / "model", config=config or {})
        if edit is not None:
            file = model_dir / "model.safetensors"
            tensors = load_file(file)
            edit(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
        return model_dir

    return write


def saved_as(auto_class: str, options: dict[str, Any], architecture: str, **variant: Any) -> Form:
    """A tiny model, loaded as transformers' `auto_class` and saved again with `options`."""

    def write(directory: Path) -> Path:
        model = getattr(transformers, auto_class).from_pretrained(tiny_model(architecture, **variant))
        model.save_pretrained(directory / "saved", **options)
        return directory / "saved"

    return write


def another_head(tensors: Tensors) -> None:
    noise = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(9))
    tensors[LM_HEAD] = 0.2 * noise


def copied_head(tensors: Tensors) -> None:
    tensors[LM_HEAD] = tensors[EMBEDDING].clone()


def head_alone(tensors: Tensors) -> None:
    """As safetensors.torch.save_model does, which keeps the first of several names of one tensor."""
    tensors[LM_HEAD] = tensors.pop(EMBEDDING)


def without_prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def with_rotary_buffers(tensors: Tensors) -> None:
    for name in ("inv_freq", "cos_cached", "sin_cached"):
        tensors[f"model.layers.1.self_attn.rotary_emb.{name}"] = torch.full((8,), 3.0)


def without(*suffixes: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(suffixes)]


def bias_warning(*absent: str) -> str:
    return f"config.json implies {', '.join(absent)}, but no layer of the checkpoint has it: zero"


NOT_TIED = f"ties {LM_HEAD} to {EMBEDDING} (tie_word_embeddings), but the checkpoint holds both and they differ"
FUSED = {"save_original_format": False}  # all experts in one tensor, as transformers 5 writes them
YARN = {**ROPE["yarn"], "rope_theta": 10000.0}
LLAMA_BIASES = {"attention_bias": True, "mlp_bias": True}
# (name, form, what the only warning says; None: no warning). All architectures have one loader and one output layer.
# tests/unit/models/test_loader.py has the parts of these forms one by one, with parameters written down by hand.
FORMS: list[tuple[str, Form, str | None]] = [
    ("tied, another head", copy_of("qwen2", another_head, tied=True), NOT_TIED),
    ("tied, a copy as head", copy_of("qwen2", copied_head, tied=True), None),
    ("tied, the head alone", copy_of("qwen3_moe", head_alone, tied=True), None),
    (
        "experts in one tensor, in several files, and a layer without experts",
        saved_as(
            "AutoModelForCausalLM", {**FUSED, "max_shard_size": "50KB"}, "qwen3_moe", mlp_only_layers=(1,), num_layers=3
        ),
        None,
    ),
    ("base model, tied, experts in one tensor", saved_as("AutoModel", FUSED, "qwen3_moe", tied=True), None),
    ("base model with a head beside it", copy_of("qwen3", without_prefix), None),
    ("rotary buffers of older versions", copy_of("llama", with_rotary_buffers), None),
    *(  # transformers initialises them with zero
        (f"{name}: no {absent}", copy_of(name, without(*absent), **variant), bias_warning(*absent))
        for name, variant, absent in (
            ("qwen3", {"attention_bias": True}, ["o_proj.bias"]),
            ("llama", LLAMA_BIASES, ["down_proj.bias", "k_proj.bias", "q_proj.bias"]),
        )
    ),
    ("swish is silu", copy_of("llama", config={"hidden_act": "swish"}), None),
    *(
        (
            f"rope key {key}",
            copy_of("qwen3", rope="yarn", config={"rope_parameters": {**YARN, key: value}}),
            f"config.json: rope parameter {key}={value!r} is not applied, as in transformers: ",
        )
        for key, value in (("attn_factor", 0.5), ("extrapolation_factor", 2.0), ("finetuned", True))
    ),
]


@pytest.mark.parametrize(("form", "warning"), [form for _, *form in FORMS], ids=[name for name, *_ in FORMS])
def test_logits_are_those_of_transformers(
    tmp_path: Path, form: Form, warning: str | None, warnings: Callable[[], list[str]]
) -> None:
    """D67, D80, D89: whatever tie_word_embeddings says, a head that differs from the embedding counts."""
    check_logits(form(tmp_path))
    assert len(warnings()) == (warning is not None), warnings()
    assert (warning or "") in "".join(warnings())


NO_FILE = "no file"  # generation_config.json does not exist


@pytest.mark.parametrize(
    ("in_config", "in_generation"),
    [
        *((in_config, NO_FILE) for in_config in (ABSENT, None, 5, [5, 8], -1, 99999)),
        *((5, in_generation) for in_generation in (ABSENT, None, 7, [6, 7], -1, [-1, 7], 99999)),
        *((in_config, [6, 7]) for in_config in (ABSENT, None, [5, 8], 99999)),
        (-1, ABSENT),
    ],
)
def test_eos_ids_are_those_of_transformers_generate(tmp_path: Path, in_config: Any, in_generation: Any) -> None:
    """D91: generation_config.json alone decides where it exists. Ids outside the vocabulary end nothing."""
    ids = {"config": {"eos_token_id": in_config}, "generation_config": {"eos_token_id": in_generation}}
    model_dir = copy_model(tiny_model("llama"), tmp_path / "model", **ids)
    if in_generation == NO_FILE:
        (model_dir / "generation_config.json").unlink()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dir).generation_config.eos_token_id
    ids = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    expected = {token_id for token_id in ids if 0 <= token_id < VOCAB_SIZE}
    assert load_model_config(model_dir).eos_token_ids == expected
    count_comparisons("config: end-of-sequence ids against transformers", 1)
