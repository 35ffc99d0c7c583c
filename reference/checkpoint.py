"""Checkpoint: a Hugging Face folder is numbers by name (safetensors files) and a few settings (config.json).

    file.safetensors      = 8 bytes: n, little-endian | n bytes of JSON | the data of all tensors
    the JSON              = name -> dtype, shape, data_offsets [start, end), counted from the end of the JSON
    index.json weight_map = name -> which file, when the model is cut into several

Why safetensors: it is a file of plain numbers, which cannot run code when it is read and can be mapped into memory. Why
the settings are so few: sizes, biases, query and key norms and which layers are mixtures can be seen in the weights.

config.json has two layouts: rope_theta with rope_scaling (null, or a dict), and since transformers 5 one dict
rope_parameters with both. With tied embeddings, one matrix embeds tokens and computes logits.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfig:
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False
    eos_token_ids: frozenset[int] = frozenset()


class Checkpoint(NamedTuple):
    weights: Mapping[str, Tensor]
    config: ModelConfig


def load_checkpoint(model_dir: str | Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Read a folder. Every weight is converted to dtype."""
    folder = Path(model_dir)
    raw = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    weights: dict[str, Tensor] = {}
    for name in sorted(names):
        weights |= {key: tensor.to(dtype) for key, tensor in read_safetensors((folder / name).read_bytes()).items()}
    if raw.get("tie_word_embeddings") or "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    generation = folder / "generation_config.json"
    for_generation = json.loads(generation.read_text()) if generation.exists() else {}
    return Checkpoint(weights, read_config(raw, [raw.get("eos_token_id"), for_generation.get("eos_token_id")]))


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of one file.

    >>> header = json.dumps({"w": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
    >>> read_safetensors(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, 2.5))
    {'w': tensor([[1.5000, 2.5000]])}
    """
    (header_len,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_len])
    body = data[8 + header_len :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            numbers = torch.frombuffer(bytearray(body[start:end]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = numbers.reshape(entry["shape"])
    return tensors


def read_config(raw: Mapping[str, Any], eos: list[int | list[int] | None]) -> ModelConfig:
    """The settings, from either layout.

    >>> old = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "rope_theta": 5e5}
    >>> config = read_config(old, eos=[7, [7, 9], None])
    >>> config.head_dim, config.num_key_value_heads, config.rope_theta, sorted(config.eos_token_ids)
    (16, 4, 500000.0, [7, 9])
    """
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    num_heads = raw["num_attention_heads"]
    return ModelConfig(
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // num_heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
        rope_scaling=rope,
        num_experts_per_tok=raw.get("num_experts_per_tok") or 0,
        norm_topk_prob=bool(raw.get("norm_topk_prob")),
        eos_token_ids=frozenset(i for ids in eos if ids is not None for i in (ids if isinstance(ids, list) else [ids])),
    )


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
