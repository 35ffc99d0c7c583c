"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): the shared decoder with a bias on q, k and v."""

from nanovllm.config_json import RawConfig, get_int, get_list
from nanovllm.model_config import Architecture, LayerOptions, enabled_sliding_window

DEFAULT_MAX_WINDOW_LAYERS = 28


def sliding_window(raw: RawConfig) -> int | None:
    """The sliding window of the layers from index max_window_layers on.

    None if it is disabled, if there is no such layer, or if layer_types defines the attention of each layer.
    """
    window = enabled_sliding_window(raw)
    if window is None or get_list(raw, "layer_types"):
        return None
    first_layer = get_int(raw, "max_window_layers", DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
    return window if first_layer < get_int(raw, "num_hidden_layers") else None


ARCHITECTURE = Architecture(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    default_max_position_embeddings=32768,
    read_layer_options=lambda raw: LayerOptions(qkv_bias=True),  # config.json has no key for this bias
    sliding_window=sliding_window,
)
