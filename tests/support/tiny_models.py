"""Tiny random checkpoints of every supported architecture, written by transformers and cached for the process.

They have a byte-level tokenizer, so that an LLM can be built on them. Weights (biases and norm weights too) are random
and so large that attention is sharp, logits spread, and a test notices when a weight is left out.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 320
EOS_TOKEN_ID = 256  # the tokenizer has the 256 bytes and this; the other ids of the model are never in a prompt
TRAINED_LEN = 64  # original_max_position_embeddings: short, so that tests reach beyond it
ABSENT = "absent"  # in place of a key's value
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED_LEN,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": TRAINED_LEN},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": EOS_TOKEN_ID,
    "bos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {  # model_type -> keys that the others do not have
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
}


def tiny_model(architecture: str, **variant: Any) -> Path:
    """A directory with the checkpoint of `variant`: the keywords and defaults of _build. Made once, never changed."""
    return _cached(architecture, tuple(sorted(variant.items())))


def copy_model(source: Path, target: Path, **changes: dict[str, Any]) -> Path:
    """A copy of a model's directory. changes: a JSON file's name without .json -> keys to set, or ABSENT to remove."""
    shutil.copytree(source, target)
    for name, keys in changes.items():
        path = target / f"{name}.json"
        values = json.loads(path.read_text()) | keys
        path.write_text(json.dumps({key: value for key, value in values.items() if value != ABSENT}))
    return target


def random_tokens(count: int, seed: int) -> list[int]:
    """Token ids of the tiny models' vocabulary."""
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def recipe_of(directory: Path) -> tuple[str, dict[str, Any]] | None:
    """(architecture, variant) with which tiny_model made `directory`; None if it did not."""
    return _recipes.get(directory)


_recipes: dict[Path, tuple[str, dict[str, Any]]] = {}


@functools.cache
def _cached(architecture: str, variant: tuple[tuple[str, Any], ...]) -> Path:
    directory = _root() / f"{architecture}-{len(_recipes)}"
    _build(directory, architecture, **dict(variant))
    _recipes[directory] = (architecture, dict(variant))
    return directory


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="nanovllm-tiny-models-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def _build(
    directory: Path,
    architecture: str,
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    tied: bool = False,
    rope: str = "default",
    rope_theta: float = 10000.0,
    sharded: bool = False,
    old_layout: bool = False,  # config.json as transformers 4.5x wrote it
    dtype: str = "float32",
    initializer_range: float = 0.2,
    **options: Any,  # other keys of config.json; a tuple stands for a list
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    named = {
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "tie_word_embeddings": tied,
        "rope_parameters": {**ROPE[rope], "rope_theta": rope_theta},
    }
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    config = AutoConfig.for_model(architecture, **(COMMON | ARCHITECTURES[architecture] | named | options))
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = initializer_range * torch.randn(parameter.shape, generator=generator)
            is_norm_weight = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + noise if is_norm_weight else noise)
    model.save_pretrained(directory, max_shard_size="100KB" if sharded else "5GB")
    _write_tokenizer(directory)
    if old_layout:
        _rewrite_config_in_old_layout(directory / "config.json")


def _rewrite_config_in_old_layout(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else {**rope, "type": rope.pop("rope_type")}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config | {"transformers_version": "4.51.0"}))


def _write_tokenizer(directory: Path) -> None:
    """One token a byte, and <eos>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _variants() -> list[tuple[str, dict[str, Any]]]:
    of_each: list[dict[str, Any]] = [
        {},
        {"tied": True, "num_kv_heads": 1},
        {"rope": "linear", "num_kv_heads": 4},
        {"rope": "llama3", "head_dim": 32, "sharded": True},
        {"rope": "yarn"},
        {"old_layout": True},
        {"rope": "yarn", "old_layout": True, "tied": True},
    ]
    variants = [{"architecture": architecture, **variant} for architecture in ARCHITECTURES for variant in of_each]
    variants += [
        {"architecture": "llama", "attention_bias": True, "mlp_bias": True, "num_layers": 3},
        {"architecture": "llama", "rope": "linear", "old_layout": True},
        {"architecture": "llama", "rope": "llama3", "old_layout": True},
        {"architecture": "qwen2", "num_layers": 3, "rope_theta": 1e6},
        {"architecture": "qwen3", "attention_bias": True, "num_layers": 3},
        {"architecture": "qwen3_moe", "attention_bias": True},
        {"architecture": "qwen3_moe", "norm_topk_prob": False},
        {"architecture": "qwen3_moe", "norm_topk_prob": False, "old_layout": True, "sharded": True},
        {"architecture": "qwen3_moe", "mlp_only_layers": (1,), "num_layers": 3},
        {"architecture": "qwen3_moe", "decoder_sparse_step": 2, "num_layers": 3},
    ]
    return [("-".join(f"{name}={value}" for name, value in variant.items()), variant) for variant in variants]


# (id, keywords of tiny_model): each architecture tied and untied, with every rope type, GQA ratios 1, 2 and 4, head_dim
# not hidden / heads, biases, both config layouts, sharded and whole, and MoE's options.
VARIANTS = _variants()
