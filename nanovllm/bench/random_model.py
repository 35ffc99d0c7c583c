"""Checkpoints with the shape of a known model and random weights, to measure speed. They have no tokenizer."""

from pathlib import Path
from typing import Any

from nanovllm.omp_wait_policy import passive_omp_wait
from nanovllm.validation import require_choice, require_int

# transformers' configuration class, and what differs from its defaults. From the models' published config.json.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "Qwen3Config",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "llama-3-8b": (
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "qwen2.5-0.5b": (
        "Qwen2Config",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
}


def make_config(like: str, num_layers: int | None = None) -> Any:
    """transformers' configuration of SHAPES[like], with num_layers layers if given. Raises ValueError for others."""
    require_choice("like", like, SHAPES)
    if num_layers is not None:
        require_int("num_layers", num_layers, 1)
    with passive_omp_wait():  # transformers imports torch
        import transformers

    class_name, options = SHAPES[like]
    if num_layers is not None:
        options = {**options, "num_hidden_layers": num_layers}
    return getattr(transformers, class_name)(**options)


def make_random_model(directory: Path, config: Any) -> None:
    """Write config.json and bfloat16 safetensors of `config` to `directory`. Takes seconds on a GPU, and about a minute
    for the small models on a CPU.
    """
    with passive_omp_wait():
        import torch
        import transformers

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
