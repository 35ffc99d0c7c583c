"""Checkpoints with the sizes of a known model and random weights, for measuring speed. They have no tokenizer."""

from pathlib import Path
from typing import Any

from nanovllm.model_config import MAX_LAYERS
from nanovllm.omp_wait_policy import passive_omp_wait
from nanovllm.validation import require_choice, require_int

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings"),
)
_EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}


def _shape(name: str, rope_theta: float, sizes: tuple[int, ...], **others: Any) -> tuple[str, dict[str, Any]]:
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    return f"{name}Config", {**dict(zip(_SIZES, sizes, strict=True)), "rope_parameters": rope, **others}


# transformers' configuration class, and the values of the model's published config.json that differ from its defaults.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": _shape("Qwen3", 1e6, (1024, 3072, 28, 16, 8, 151936, 40960), head_dim=128, tie_word_embeddings=True),
    "llama-3-8b": _shape("Llama", 5e5, (4096, 14336, 32, 32, 8, 128256, 8192), head_dim=128),
    "qwen2.5-0.5b": _shape("Qwen2", 1e6, (896, 4864, 24, 14, 2, 151936, 32768), tie_word_embeddings=True),
    "qwen3-30b-a3b": _shape("Qwen3Moe", 1e6, (2048, 6144, 48, 32, 4, 151936, 40960), head_dim=128, **_EXPERTS),
}


def make_config(like: str, num_layers: int | None = None) -> Any:
    """transformers' configuration of SHAPES[like], with num_layers layers if given. Raises ValueError for others."""
    require_choice("like", like, SHAPES)
    class_name, options = SHAPES[like]
    if num_layers is not None:
        require_int("num_layers", num_layers, 1, MAX_LAYERS)
        options = {**options, "num_hidden_layers": num_layers}
    with passive_omp_wait():
        import transformers

        return getattr(transformers, class_name)(**options)  # the class imports torch


def make_random_model(directory: Path, config: Any) -> None:
    """Write config.json and bfloat16 safetensors of `config` to `directory`. Takes seconds on a GPU, and about a minute
    for the small models on a CPU.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
