"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783): the shared decoder, with the biases that config.json sets."""

from nanovllm.config_json import RawConfig, get_bool
from nanovllm.model_config import Architecture, LayerOptions


def read_layer_options(raw: RawConfig) -> LayerOptions:
    attention_bias = get_bool(raw, "attention_bias")
    return LayerOptions(qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=get_bool(raw, "mlp_bias"))


ARCHITECTURE = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    default_max_position_embeddings=2048,
    requires_num_key_value_heads=False,  # checkpoints older than grouped-query attention lack the key
    read_layer_options=read_layer_options,
)
