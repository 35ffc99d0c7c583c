"""Mistral (arXiv 2310.06825) without its sliding window, which checkpoints from version 0.2 on do not use."""

from nanovllm.model_config import Architecture, LayerOptions

ARCHITECTURE = Architecture(
    model_type="mistral",
    class_name="MistralForCausalLM",
    default_max_position_embeddings=131072,
    read_layer_options=lambda raw: LayerOptions(),
    sliding_window=lambda raw: raw.get("sliding_window", 4096),
)
