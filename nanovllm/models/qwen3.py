"""Qwen3 (arXiv 2505.09388): each head's query and key are normalised before they are rotated."""

from nanovllm.config_json import RawConfig, get_bool
from nanovllm.model_config import Architecture, LayerOptions
from nanovllm.models.qwen2 import sliding_window


def read_layer_options(raw: RawConfig) -> LayerOptions:
    attention_bias = get_bool(raw, "attention_bias")
    return LayerOptions(qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True)


ARCHITECTURE = Architecture(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    default_max_position_embeddings=32768,
    default_head_dim=128,
    read_layer_options=read_layer_options,
    sliding_window=sliding_window,
)
