"""Checkpoints in forms that transformers accepts beside the usual one: the same logits as there, in float32 on the CPU.

Each is made from a tiny random model. The bound is that of test_hugging_face.py.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.models.registry import load_model_config
from tests.support.comparing import assert_within
from tests.support.counts import count_comparisons
from tests.support.hugging_face import hugging_face_logits
from tests.support.model_probe import make_runner, teacher_forced_logits
from tests.support.oracle import ERROR_RATIO
from tests.support.tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model

Tensors = dict[str, torch.Tensor]
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "attention_backend": "torch"}
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def copy_of(
    directory: Path,
    architecture: str,
    edit: Callable[[Tensors], None] | None = None,
    config: dict[str, Any] | None = None,
    **variant: Any,
) -> Path:
    """A tiny model's copy, its tensors edited in every file that holds some, its config.json with changes."""
    model_dir = directory / "model"
    shutil.copytree(tiny_model(architecture, **variant), model_dir)
    if edit is not None:
        tensors = load_file(model_dir / "model.safetensors")
        edit(tensors)
        save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    change_json(model_dir / "config.json", config or {})
    return model_dir


def change_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def saved_by_transformers(directory: Path, model_dir: Path, auto_class: str, **options: Any) -> Path:
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(model_dir)
    model.save_pretrained(directory / "saved", **options)
    return directory / "saved"


def assert_same_logits(model_dir: Path) -> None:
    token_ids = torch.randint(VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = hugging_face_logits(model_dir, token_ids, torch.float64)
    rounding = (hugging_face_logits(model_dir, token_ids, torch.float32) - exact).abs().max()
    runner = make_runner(model_dir, kv_cache_block_size=16, num_kv_cache_blocks=4, **OPTIONS)
    ours = teacher_forced_logits(runner, token_ids, chunks=[33], block_table=[2, 0, 3])
    assert_within("engine: logits of other forms of checkpoints", ours, exact, float(ERROR_RATIO * rounding))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What nanovllm has warned of so far."""
    caplog.set_level(logging.WARNING, "nanovllm")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "nanovllm"]


def another_head(tensors: Tensors) -> None:
    noise = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(9))
    tensors[LM_HEAD] = 0.2 * noise


@architectures
def test_a_head_that_differs_from_the_embedding_is_not_tied(tmp_path: Path, architecture: str, warnings) -> None:
    """D80: whatever tie_word_embeddings says; one warning names both tensors."""
    assert_same_logits(copy_of(tmp_path, architecture, another_head, tied=True))
    (warning,) = warnings()
    assert (
        f"ties {LM_HEAD} to {EMBEDDING} (tie_word_embeddings), but the checkpoint holds both and they differ" in warning
    )


def test_a_head_of_another_file_is_not_tied(tmp_path: Path, warnings) -> None:
    """D80: the two tensors lie in different shards."""
    model_dir = copy_of(tmp_path, "qwen3", head_dim=32, sharded=True, config={"tie_word_embeddings": True})
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())["weight_map"]
    assert index[LM_HEAD] != index[EMBEDDING]
    assert_same_logits(model_dir)
    assert len(warnings()) == 1


@architectures
def test_a_copy_of_the_embedding_is_tied_in_silence(tmp_path: Path, architecture: str, warnings) -> None:
    """D80, D67"""
    model_dir = copy_of(
        tmp_path, architecture, lambda tensors: tensors.update({LM_HEAD: tensors[EMBEDDING].clone()}), tied=True
    )
    assert_same_logits(model_dir)
    model = make_runner(model_dir, kv_cache_block_size=16, num_kv_cache_blocks=4, **OPTIONS).model
    assert model.is_tied
    assert warnings() == []


@architectures
def test_tied_weights_may_be_stored_as_the_head_alone(tmp_path: Path, architecture: str, warnings) -> None:
    """D80: as safetensors.torch.save_model does, which keeps the first name of several for one tensor."""
    model_dir = copy_of(tmp_path, architecture, lambda t: t.update({LM_HEAD: t.pop(EMBEDDING)}), tied=True)
    assert_same_logits(model_dir)
    assert warnings() == []


@pytest.mark.parametrize("variant", [{}, {"mlp_only_layers": (1,), "num_layers": 3}, {"attention_bias": True}])
@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_experts_in_one_tensor(tmp_path: Path, variant: dict[str, Any], max_shard_size: str, warnings) -> None:
    """D89: what transformers 5 writes with save_original_format=False."""
    model_dir = saved_by_transformers(
        tmp_path,
        tiny_model("qwen3_moe", **variant),
        "AutoModelForCausalLM",
        save_original_format=False,
        max_shard_size=max_shard_size,
    )
    assert_same_logits(model_dir)
    assert warnings() == []


@pytest.mark.parametrize(
    ("architecture", "is_fused"), [*((name, False) for name in ARCHITECTURES), ("qwen3_moe", True)]
)
def test_a_base_model_that_is_tied(tmp_path: Path, architecture: str, is_fused: bool, warnings) -> None:
    """D89: names without `model.`, and the embedding serves as head."""
    source = tiny_model(architecture, tied=True)
    model_dir = saved_by_transformers(tmp_path, source, "AutoModel", save_original_format=not is_fused)
    assert not any(name.startswith("model.") for name in load_file(model_dir / "model.safetensors"))
    assert_same_logits(model_dir)
    assert warnings() == []


def test_a_base_model_with_a_head_beside_it(tmp_path: Path, warnings) -> None:
    """D89"""

    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert_same_logits(copy_of(tmp_path, "qwen3", strip))
    assert warnings() == []


def test_a_base_model_without_a_head_is_refused(tmp_path: Path) -> None:
    """D89: transformers would draw the head at random."""
    model_dir = saved_by_transformers(tmp_path, tiny_model("qwen3"), "AutoModel")
    with pytest.raises(ValueError, match=r"lacks weights of this model \(1\): lm_head.weight$"):
        make_runner(model_dir, kv_cache_block_size=16, num_kv_cache_blocks=4, **OPTIONS)


@pytest.mark.parametrize("buffer", ["inv_freq", "cos_cached", "sin_cached"])
def test_rotary_buffers_of_older_versions_are_passed_over(tmp_path: Path, buffer: str, warnings) -> None:
    """D89: they follow from config.json."""

    def add(tensors: Tensors) -> None:
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.{buffer}": torch.full((8,), 3.0) for i in range(2)}

    assert_same_logits(copy_of(tmp_path, "llama", add))
    assert warnings() == []


def without(*suffixes: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(suffixes)]:
            del tensors[name]

    return edit


@pytest.mark.parametrize(
    ("architecture", "variant", "absent"),
    [
        ("llama", {"attention_bias": True}, ["o_proj.bias"]),
        ("qwen3", {"attention_bias": True}, ["o_proj.bias"]),
        ("llama", {"attention_bias": True, "mlp_bias": True}, ["down_proj.bias", "k_proj.bias", "q_proj.bias"]),
        ("qwen2", {}, ["k_proj.bias", "q_proj.bias", "v_proj.bias"]),
    ],
)
def test_a_bias_that_no_layer_has_is_zero(
    tmp_path: Path, architecture: str, variant: dict[str, Any], absent: list[str], warnings
) -> None:
    """D89: as transformers initialises it; one warning names the kinds."""
    assert_same_logits(copy_of(tmp_path, architecture, without(*absent), **variant))
    (warning,) = warnings()
    assert f"config.json implies {', '.join(absent)}, but no layer of the checkpoint has it: zero" in warning


def test_swish_is_silu(tmp_path: Path) -> None:
    """D89"""
    assert_same_logits(copy_of(tmp_path, "llama", config={"hidden_act": "swish"}))


@pytest.mark.parametrize(("key", "value"), [("attn_factor", 0.5), ("extrapolation_factor", 2.0), ("finetuned", True)])
def test_rope_keys_that_transformers_passes_over(tmp_path: Path, key: str, value: Any, warnings) -> None:
    """D89: they are named in one warning."""
    model_dir = copy_of(tmp_path, "qwen3", rope="yarn")
    rope = json.loads((model_dir / "config.json").read_text())["rope_parameters"]
    change_json(model_dir / "config.json", {"rope_parameters": rope | {key: value}})
    assert_same_logits(model_dir)
    (warning,) = warnings()
    assert warning.startswith(f"config.json: rope parameter {key}={value!r} is not applied, as in transformers: ")


# End-of-sequence ids: (eos_token_id of config.json, of generation_config.json); ABSENT without the key.
ABSENT = "absent"
NO_FILE = "no file"


@pytest.mark.parametrize("in_generation", [NO_FILE, ABSENT, None, 7, [6, 7], -1, [-1, 7], 99999])
@pytest.mark.parametrize("in_config", [ABSENT, None, 5, [5, 8], -1, 99999])
def test_eos_ids_are_those_of_transformers_generate(tmp_path: Path, in_config: Any, in_generation: Any) -> None:
    """D91: generation_config.json alone decides where it is there. Ids outside the vocabulary end nothing."""
    from transformers import AutoModelForCausalLM

    model_dir = copy_of(tmp_path, "llama")
    raw = json.loads((model_dir / "config.json").read_text()) | {"eos_token_id": in_config}
    (model_dir / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != ABSENT}))
    generation = model_dir / "generation_config.json"
    generation.unlink()
    if in_generation != NO_FILE:
        generation.write_text(json.dumps({} if in_generation == ABSENT else {"eos_token_id": in_generation}))
    theirs = AutoModelForCausalLM.from_pretrained(model_dir).generation_config.eos_token_id
    ids = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    expected = {token_id for token_id in ids if 0 <= token_id < VOCAB_SIZE}
    assert load_model_config(model_dir).eos_token_ids == expected
    count_comparisons("config: end-of-sequence ids against transformers", 1)


@pytest.mark.parametrize("place", [0, 3, 9])
def test_generation_stops_where_transformers_stops(tmp_path: Path, place: int) -> None:
    """D91: config.json names a token that greedy decoding meets first, generation_config.json a later one."""
    from transformers import AutoModelForCausalLM

    prompt = list(range(1, 9))
    options = SamplingParams.greedy(max_tokens=16, ignore_eos=True)
    source = tiny_model("qwen3")
    with LLM(str(source), num_kv_cache_blocks=8, max_num_seqs=2, **OPTIONS) as llm:
        (free,) = llm.generate([prompt], options, use_tqdm=False)
    tokens = free["token_ids"]
    model_dir = copy_of(tmp_path, "qwen3", config={"eos_token_id": tokens[0]})
    change_json(model_dir / "generation_config.json", {"eos_token_id": tokens[place]})
    theirs = AutoModelForCausalLM.from_pretrained(model_dir).generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    with LLM(str(model_dir), num_kv_cache_blocks=8, max_num_seqs=2, **OPTIONS) as llm:
        (output,) = llm.generate([prompt], SamplingParams.greedy(max_tokens=16), use_tqdm=False)
    assert output["token_ids"] == theirs[0, len(prompt) :].tolist()
    count_comparisons("engine: where generation stops against transformers' generate", 1)
