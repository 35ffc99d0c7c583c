"""ModelConfig: what the engine knows about a checkpoint, and the only reader of Hugging Face config attributes.

Reads config.json and generation_config.json as plain JSON, in the layout of transformers 5 (rope_parameters, dtype,
num_local_experts) and in the one before (rope_theta and rope_scaling, torch_dtype, num_experts). A key that may be
missing has the default that transformers gives it. Whatever nanovllm does not implement is refused by name, never
ignored. For it, rope_config.py and moe_config.py read the keys of their parts, with the checks of config_json.py.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.config_json import get_bool, get_int, get_list, get_number, read_json
from nanovllm.moe_config import MoEConfig, read_moe
from nanovllm.rope_config import RopeConfig, read_rope
from nanovllm.validation import is_int, require_choice

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
WEIGHT_DTYPES = ("float64", "float32", "bfloat16", "float16")
DEFAULT_DTYPE = "float32"  # of a checkpoint that states none, as in transformers
DEFAULT_MAX_POSITION_EMBEDDINGS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768}
DEFAULT_MAX_WINDOW_LAYERS = 28
SILU_NAMES = ("silu", "swish")  # one function
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QWEN3_HEAD_DIM = 128  # of a qwen3 checkpoint without the key; the others then have hidden_size // num_attention_heads

logger = logging.getLogger("nanovllm")


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint's architecture; the names are those of Hugging Face where it has them.

    dtype: the name of the weights' torch dtype, such as "bfloat16".
    eos_token_ids: every id that ends a text, as for transformers' generate: those of generation_config.json if that
    file is there (none, if it names none), else those of config.json.
    tokenizer_class: what config.json names; transformers uses it where tokenizer_config.json names none.
    qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
    moe: None for a model without experts.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: frozenset[int]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    moe: MoEConfig | None = None
    tokenizer_class: str | None = None

    @property
    def max_supported_len(self) -> int:
        """The longest sequence, in tokens, that the position embedding is made for.

        linear stretches max_position_embeddings by factor; yarn stretches the length trained on, and checkpoints
        state max_position_embeddings before or after that; llama3 checkpoints state it after.
        """
        if self.rope.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    def check_tensor_parallel_size(self, size: int) -> None:
        """Raise ValueError unless `size` ranks can share this model evenly. Needs no torch and no process."""
        obstacle = self._tensor_parallel_obstacle(size)
        if obstacle:
            fitting = next(fewer for fewer in range(size - 1, 0, -1) if not self._tensor_parallel_obstacle(fewer))
            raise ValueError(
                f"tensor_parallel_size must divide the model's {obstacle}, got {size}; {fitting} would fit"
            )

    def _tensor_parallel_obstacle(self, size: int) -> str:
        """What `size` ranks cannot share evenly, as "name=value"; empty if nothing."""
        shared = {"num_attention_heads": self.num_attention_heads, "vocab_size": self.vocab_size}
        if self.moe is None or len(self.moe.layers) < self.num_hidden_layers:
            shared["intermediate_size"] = self.intermediate_size
        if self.moe is not None:
            shared["moe_intermediate_size"] = self.moe.moe_intermediate_size
        for name, value in shared.items():
            if value % size:
                return f"{name}={value}"
        if self.num_key_value_heads % size and size % self.num_key_value_heads:
            return f"num_key_value_heads={self.num_key_value_heads} (or be a multiple of it)"
        return ""


def load_model_config(model_dir: str | Path) -> ModelConfig:
    """Read config.json, and generation_config.json if there is one, of a checkpoint's directory.

    Raises ValueError when the directory or config.json is missing or broken, when a key is missing or wrong, and for
    everything that nanovllm does not support.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ValueError(f"model must be a directory that exists, got {str(model_dir)!r}; check the path")
    config_file = model_dir / "config.json"
    _check_adapter(model_dir, config_file.is_file())
    if not config_file.is_file():
        raise ValueError(f"{str(model_dir)!r} must hold a config.json, as Hugging Face checkpoints do; there is none")
    raw = read_json(config_file)
    generation_file = model_dir / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else None
    try:
        return _parse(raw, generation)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None


def _check_adapter(model_dir: Path, has_model: bool) -> None:
    """Warn of a LoRA adapter, which is not applied; raise ValueError if there is nothing else."""
    found = ", ".join(name for name in ADAPTER_FILES if (model_dir / name).is_file())
    if not found:
        return
    remedy = "merge it into the model's weights first, with peft's merge_and_unload() and save_pretrained()"
    if not has_model:
        raise ValueError(f"{str(model_dir)!r} holds a LoRA adapter ({found}) and no config.json: {remedy}")
    logger.warning("%s holds a LoRA adapter (%s), which is not applied: %s", model_dir, found, remedy)


def _parse(raw: dict[str, Any], generation: dict[str, Any] | None) -> ModelConfig:
    model_type = _check_architecture(raw)
    _check_unsupported(raw, model_type)
    hidden_size = get_int(raw, "hidden_size")
    num_heads = get_int(raw, "num_attention_heads")
    num_kv_heads = _num_key_value_heads(raw, model_type, num_heads)
    attention_bias = get_bool(raw, "attention_bias")
    vocab_size = get_int(raw, "vocab_size")
    max_position_embeddings = get_int(raw, "max_position_embeddings", DEFAULT_MAX_POSITION_EMBEDDINGS[model_type])
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=get_int(raw, "intermediate_size"),
        num_hidden_layers=get_int(raw, "num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=_head_dim(raw, model_type, hidden_size, num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=get_number(raw, "rms_norm_eps", 1e-6),
        rope=read_rope(raw, max_position_embeddings),
        tie_word_embeddings=get_bool(raw, "tie_word_embeddings"),
        dtype=_dtype(raw),
        eos_token_ids=_eos_token_ids(raw, generation, vocab_size),
        qkv_bias=model_type == "qwen2" or attention_bias,  # qwen2 has these biases without a key that says so
        o_bias=model_type != "qwen2" and attention_bias,
        mlp_bias=model_type == "llama" and get_bool(raw, "mlp_bias"),
        moe=read_moe(raw) if model_type == "qwen3_moe" else None,
        tokenizer_class=_tokenizer_class(raw),
    )


def _check_architecture(raw: dict[str, Any]) -> str:
    model_type = raw.get("model_type")
    supported = ", ".join(ARCHITECTURES)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"model_type must be one of {supported} (what nanovllm supports), got {model_type!r}")
    expected = ARCHITECTURES[model_type]
    architectures = get_list(raw, "architectures") or [expected]
    # A base model (LlamaModel) lacks lm_head: the loader finds out whether the embedding serves as one
    if not {expected, expected.replace("ForCausalLM", "Model")} & set(map(str, architectures)):
        raise ValueError(
            f"architectures of a {model_type} checkpoint must contain {expected!r}, "
            f"got {architectures!r}; nanovllm supports {', '.join(ARCHITECTURES.values())}"
        )
    return model_type


def _check_unsupported(raw: dict[str, Any], model_type: str) -> None:
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method") if isinstance(raw[key], dict) else raw[key]
            raise ValueError(
                f"{key} ({method}) is not supported: nanovllm reads float32, bfloat16 and float16 weights; "
                "take the checkpoint that is not quantised"
            )
    hidden_act = raw.get("hidden_act", "silu")
    if hidden_act not in SILU_NAMES:
        raise ValueError(f"hidden_act must be 'silu' (nanovllm supports no other), got {hidden_act!r}")
    if raw.get("use_mrope"):
        raise ValueError("use_mrope (multimodal rotary embedding) is not supported: it must be false")
    _check_sliding_window(raw, model_type)


def _check_sliding_window(raw: dict[str, Any], model_type: str) -> None:
    layer_types = get_list(raw, "layer_types")
    if layer_types:
        others = sorted({str(layer_type) for layer_type in layer_types} - {"full_attention"})
        if others:
            raise ValueError(f"layer_types must be all 'full_attention' (no sliding window), got {', '.join(others)}")
        if model_type in ("qwen2", "qwen3"):
            return  # here layer_types is what decides, and the keys below only document it
    window = raw.get("sliding_window")
    if not raw.get("use_sliding_window") or window is None:
        return
    first = get_int(raw, "max_window_layers", DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
    if model_type in ("qwen2", "qwen3") and first >= get_int(raw, "num_hidden_layers"):
        return  # the window would begin at a layer that does not exist
    raise ValueError(
        f"use_sliding_window with sliding_window={window} is not supported: nanovllm attends to all tokens"
    )


def _num_key_value_heads(raw: dict[str, Any], model_type: str, num_heads: int) -> int:
    if raw.get("num_key_value_heads") is None and (model_type == "llama" or "num_key_value_heads" in raw):
        return num_heads  # checkpoints from before grouped-query attention, or null
    num_kv_heads = get_int(raw, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads={num_kv_heads}, got {num_heads}"
        )
    return num_kv_heads


def _head_dim(raw: dict[str, Any], model_type: str, hidden_size: int, num_heads: int) -> int:
    if model_type == "qwen3" and "head_dim" not in raw:
        return QWEN3_HEAD_DIM
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads={num_heads}, got {hidden_size}")
    head_dim = get_int(raw, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even (rotary embedding turns pairs), got {head_dim}")
    return head_dim


def _dtype(raw: dict[str, Any]) -> str:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or DEFAULT_DTYPE
    dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    require_choice("dtype", dtype, WEIGHT_DTYPES)
    return dtype


def _eos_token_ids(raw: dict[str, Any], generation: dict[str, Any] | None, vocab_size: int) -> frozenset[int]:
    """generation_config.json alone decides, if it is there; config.json is read only in its absence."""
    source, file_name = (raw, "config.json") if generation is None else (generation, "generation_config.json")
    given = source.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for token_id in ids:
        if not is_int(token_id):
            raise ValueError(f"eos_token_id ({file_name}) must be an integer or a list of integers, got {given!r}")
    eos_token_ids = frozenset(token_id for token_id in ids if 0 <= token_id < vocab_size)
    if len(eos_token_ids) < len(set(ids)):
        logger.warning(
            "eos_token_id %r of %s names ids outside the vocabulary (0 to %d): these end no text",
            given,
            file_name,
            vocab_size - 1,
        )
    return eos_token_ids


def _tokenizer_class(raw: dict[str, Any]) -> str | None:
    name = raw.get("tokenizer_class")
    if not isinstance(name, (str, type(None))):
        raise ValueError(f"tokenizer_class must be a string, got {name!r}")
    return name
