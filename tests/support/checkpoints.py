"""Small checkpoints, by Hugging Face's names and shapes, which are spelled out here and not derived from our models."""

from typing import Any

import torch

from nanovllm.model_config import ModelConfig, MoEConfig
from nanovllm.rope_config import RopeConfig

SMALL_MOE = MoEConfig(
    num_experts=3, num_experts_per_tok=2, moe_intermediate_size=4, norm_topk_prob=True, layers=frozenset({1})
)


def small_config(model_type: str = "qwen3", **changes: Any) -> ModelConfig:
    """Two layers in which no two sizes are equal, so that no two weights can be mixed up unnoticed."""
    values: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": 20,
        "hidden_size": 10,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope": RopeConfig(),
        "tie_word_embeddings": False,
        "dtype": "float32",
        "eos_token_ids": frozenset(),
        "qkv_bias": True,
        "o_bias": False,
        "mlp_bias": False,
        "moe": SMALL_MOE if model_type == "qwen3_moe" else None,
    }
    return ModelConfig(**(values | changes))


def checkpoint_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Name -> random tensor, for every weight of a complete untied checkpoint."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= _attention_shapes(config, f"{layer}.self_attn")
        if config.moe is not None and index in config.moe.layers:
            shapes[f"{layer}.mlp.gate.weight"] = (config.moe.num_experts, hidden)
            for expert in range(config.moe.num_experts):
                size = config.moe.moe_intermediate_size
                shapes |= _mlp_shapes(f"{layer}.mlp.experts.{expert}", hidden, size, has_bias=False)
        else:
            shapes |= _mlp_shapes(f"{layer}.mlp", hidden, config.intermediate_size, config.mlp_bias)
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def _attention_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.o_proj.weight": (config.hidden_size, query)}
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        shapes[f"{prefix}.{name}.weight"] = (rows, config.hidden_size)
        if config.qkv_bias:
            shapes[f"{prefix}.{name}.bias"] = (rows,)
    if config.o_bias:
        shapes[f"{prefix}.o_proj.bias"] = (config.hidden_size,)
    if config.model_type in ("qwen3", "qwen3_moe"):
        shapes[f"{prefix}.q_norm.weight"] = shapes[f"{prefix}.k_norm.weight"] = (config.head_dim,)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, size: int, has_bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in (("gate_proj", size, hidden), ("up_proj", size, hidden), ("down_proj", hidden, size)):
        shapes[f"{prefix}.{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{prefix}.{name}.bias"] = (rows,)
    return shapes
