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
        "qk_norm": model_type in ("qwen3", "qwen3_moe"),
        "moe": SMALL_MOE if model_type == "qwen3_moe" else None,
    }
    return ModelConfig(**(values | changes))


def counted_by_hand() -> ModelConfig:
    """3 layers of 8 x 4 x (2 x 2 + 2 x 1) + 3 x 8 x 16 = 576 parameters, together 1728; an output layer of 80."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "qkv_bias": False}
    sizes = {"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10}
    return small_config("llama", **heads, **sizes)


def checkpoint_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Name -> random tensor, for every weight of a complete untied checkpoint."""
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config.vocab_size, hidden))

    def add_linear(name: str, rows: int, columns: int, has_bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)

    def add_mlp(name: str, size: int, has_bias: bool) -> None:
        add_linear(f"{name}.gate_proj", size, hidden, has_bias)
        add_linear(f"{name}.up_proj", size, hidden, has_bias)
        add_linear(f"{name}.down_proj", hidden, size, has_bias)

    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        add_linear(f"{attention}.q_proj", queries, hidden, config.qkv_bias)
        add_linear(f"{attention}.k_proj", keys, hidden, config.qkv_bias)
        add_linear(f"{attention}.v_proj", keys, hidden, config.qkv_bias)
        add_linear(f"{attention}.o_proj", hidden, queries, config.o_bias)
        if config.qk_norm:
            shapes[f"{attention}.q_norm.weight"] = shapes[f"{attention}.k_norm.weight"] = (head_dim,)
        if config.moe is None or index not in config.moe.layers:
            add_mlp(f"{layer}.mlp", config.intermediate_size, config.mlp_bias)
            continue
        add_linear(f"{layer}.mlp.gate", config.moe.num_experts, hidden, has_bias=False)
        for expert in range(config.moe.num_experts):
            add_mlp(f"{layer}.mlp.experts.{expert}", config.moe.moe_intermediate_size, has_bias=False)
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
