"""ModelConfig: what the engine knows about a checkpoint. Only this module reads Hugging Face's general config keys.

It reads config.json and generation_config.json as plain JSON, in the layout of transformers 5 (rope_parameters, dtype,
num_local_experts) and in the older one (rope_theta and rope_scaling, torch_dtype, num_experts). A missing key has the
default that transformers gives it. A key whose effect nanovllm does not implement is refused by name, never ignored.
rope_config.py reads the keys of the rotary embedding, an Architecture what differs between architectures.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanovllm.config_json import RawConfig, get_bool, get_int, get_list, get_number, read_json
from nanovllm.rope_config import RopeConfig, read_rope
from nanovllm.validation import is_int, require_choice, require_int

WEIGHT_DTYPES = ("float64", "float32", "bfloat16", "float16")
DEFAULT_DTYPE = "float32"  # of a checkpoint that states none, as in transformers
MAX_LAYERS = 1000  # no model has as many; a wrong value would fill memory with layers before a weight is missed
SILU_NAMES = ("silu", "swish")  # one function
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

logger = logging.getLogger("nanovllm")


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts. layers: indices of the layers with experts; the other layers have a dense MLP."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    layers: frozenset[int]


@dataclass(frozen=True)
class LayerOptions:
    """Options of the shared decoder's layers that an architecture chooses.

    qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
    qk_norm: whether each head's query and key are normalised before they are rotated.
    moe: the experts; None for a model without any.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoEConfig | None = None


def enabled_sliding_window(raw: RawConfig) -> int | None:
    """The sliding window in tokens, if use_sliding_window is true; else None."""
    return raw.get("sliding_window") if raw.get("use_sliding_window") else None


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one architecture from the others. Each is stated in a file of nanovllm/models.

    model_type: the value of that key in config.json.
    class_name: the entry of `architectures` in config.json, which is the class of transformers.
    default_max_position_embeddings: used if config.json lacks the key.
    default_head_dim: used if config.json lacks the key; None means hidden_size // num_attention_heads.
    requires_num_key_value_heads: False means as many as num_attention_heads if config.json lacks the key.
    read_layer_options: reads the layers' options from config.json.
    sliding_window: reads the size of the sliding window that the model uses; None if it uses none.
    """

    model_type: str
    class_name: str
    default_max_position_embeddings: int
    read_layer_options: Callable[[RawConfig], LayerOptions]
    default_head_dim: int | None = None
    requires_num_key_value_heads: bool = True
    sliding_window: Callable[[RawConfig], int | None] = enabled_sliding_window


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LayerOptions):
    """The configuration of one checkpoint, in Hugging Face's names where it has them, with its LayerOptions.

    dtype: the name of the weights' torch dtype, such as "bfloat16".
    eos_token_ids: every id that ends a text, as in transformers' generate: the ids of generation_config.json if that
    file exists (none if it names none), else the ids of config.json.
    tokenizer_class: the name in config.json, which transformers uses if tokenizer_config.json names none.
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
    tokenizer_class: str | None = None

    @property
    def max_supported_len(self) -> int:
        """The longest sequence, in tokens, that the position embedding supports.

        The rope type linear multiplies max_position_embeddings by factor, and yarn the length of the training. Yarn
        checkpoints state max_position_embeddings before or after this scaling, llama3 checkpoints after it.
        """
        if self.rope.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    def check_tensor_parallel_size(self, size: int) -> None:
        """Raise ValueError unless the model can be divided evenly over `size` ranks."""
        obstacle = self._indivisible_dimension(size)
        if obstacle:
            fitting = next(fewer for fewer in range(size - 1, 0, -1) if not self._indivisible_dimension(fewer))
            raise ValueError(
                f"tensor_parallel_size must divide the model's {obstacle}, got {size}; {fitting} would fit"
            )

    def _indivisible_dimension(self, size: int) -> str:
        """The first dimension that does not divide evenly over `size` ranks, as "name=value"; "" if all do."""
        divided = {"num_attention_heads": self.num_attention_heads, "vocab_size": self.vocab_size}
        if self.moe is None or len(self.moe.layers) < self.num_hidden_layers:
            divided["intermediate_size"] = self.intermediate_size
        if self.moe is not None:
            divided["moe_intermediate_size"] = self.moe.moe_intermediate_size
        for name, value in divided.items():
            if value % size:
                return f"{name}={value}"
        if self.num_key_value_heads % size and size % self.num_key_value_heads:
            return f"num_key_value_heads={self.num_key_value_heads} (or be a multiple of it)"
        return ""


def read_model_config(model_dir: str | Path, architectures: Mapping[str, Architecture]) -> ModelConfig:
    """Read config.json, and generation_config.json if it exists, in a checkpoint's directory.

    architectures: model_type -> Architecture, for all that are supported.
    Raises ValueError if the directory or config.json is missing or broken, if a key is missing or wrong, and for
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
        return _parse(raw, generation, _find_architecture(raw, architectures))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None


def _check_adapter(model_dir: Path, has_model: bool) -> None:
    """Log a warning about a LoRA adapter, which is not applied; raise ValueError if there is no model beside it."""
    found = ", ".join(name for name in ADAPTER_FILES if (model_dir / name).is_file())
    if not found:
        return
    remedy = "merge it into the model's weights first, with peft's merge_and_unload() and save_pretrained()"
    if not has_model:
        raise ValueError(f"{str(model_dir)!r} holds a LoRA adapter ({found}) and no config.json: {remedy}")
    logger.warning("%s holds a LoRA adapter (%s), which is not applied: %s", model_dir, found, remedy)


def _find_architecture(raw: RawConfig, architectures: Mapping[str, Architecture]) -> Architecture:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in architectures:
        known = ", ".join(architectures)
        raise ValueError(f"model_type must be one of {known} (nanovllm supports no other), got {model_type!r}")
    expected = architectures[model_type].class_name
    given = get_list(raw, "architectures") or [expected]
    # A base model (LlamaModel) has no lm_head: the loader checks whether the embedding serves as one
    if not {expected, expected.replace("ForCausalLM", "Model")} & set(map(str, given)):
        known = ", ".join(architecture.class_name for architecture in architectures.values())
        raise ValueError(
            f"architectures of a {model_type} checkpoint must contain {expected!r}, got {given!r}; nanovllm supports "
            f"{known}"
        )
    return architectures[model_type]


def _parse(raw: RawConfig, generation: RawConfig | None, architecture: Architecture) -> ModelConfig:
    _check_unsupported(raw)
    _check_sliding_window(raw, architecture)
    hidden_size = get_int(raw, "hidden_size")
    num_layers = get_int(raw, "num_hidden_layers")
    require_int("num_hidden_layers", num_layers, 1, MAX_LAYERS)
    num_heads = get_int(raw, "num_attention_heads")
    vocab_size = get_int(raw, "vocab_size")
    max_positions = get_int(raw, "max_position_embeddings", architecture.default_max_position_embeddings)
    return ModelConfig(
        model_type=architecture.model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=get_int(raw, "intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=_num_key_value_heads(raw, architecture, num_heads),
        head_dim=_head_dim(raw, architecture, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=get_number(raw, "rms_norm_eps", 1e-6),
        rope=read_rope(raw, max_positions),
        tie_word_embeddings=get_bool(raw, "tie_word_embeddings"),
        dtype=_dtype(raw),
        eos_token_ids=_eos_token_ids(raw, generation, vocab_size),
        tokenizer_class=_tokenizer_class(raw),
        **vars(architecture.read_layer_options(raw)),
    )


def _check_unsupported(raw: RawConfig) -> None:
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method") if isinstance(raw[key], dict) else raw[key]
            raise ValueError(
                f"{key} ({method}) is not supported: nanovllm reads float32, bfloat16 and float16 weights; "
                "use the checkpoint without quantisation"
            )
    hidden_act = raw.get("hidden_act", "silu")
    if hidden_act not in SILU_NAMES:
        raise ValueError(f"hidden_act must be 'silu' (nanovllm supports no other), got {hidden_act!r}")
    if raw.get("use_mrope"):
        raise ValueError("use_mrope (multimodal rotary embedding) is not supported: it must be false")


def _check_sliding_window(raw: RawConfig, architecture: Architecture) -> None:
    others = sorted(set(map(str, get_list(raw, "layer_types"))) - {"full_attention"})
    if others:
        raise ValueError(f"layer_types must be all 'full_attention' (no sliding window), got {', '.join(others)}")
    window = architecture.sliding_window(raw)
    if window is not None:
        raise ValueError(
            f"a sliding window (here sliding_window={window}) is not supported: nanovllm attends to all tokens; "
            "use a checkpoint without one"
        )


def _num_key_value_heads(raw: RawConfig, architecture: Architecture, num_heads: int) -> int:
    is_required = architecture.requires_num_key_value_heads and "num_key_value_heads" not in raw
    num_kv_heads = get_int(raw, "num_key_value_heads", None if is_required else num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads={num_kv_heads}, got {num_heads}"
        )
    return num_kv_heads


def _head_dim(raw: RawConfig, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    if architecture.default_head_dim is not None and "head_dim" not in raw:
        return architecture.default_head_dim
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads={num_heads}, got {hidden_size}")
    head_dim = get_int(raw, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even (rotary embedding turns pairs), got {head_dim}")
    return head_dim


def _dtype(raw: RawConfig) -> str:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or DEFAULT_DTYPE
    dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    require_choice("dtype", dtype, WEIGHT_DTYPES)
    return dtype


def _eos_token_ids(raw: RawConfig, generation: RawConfig | None, vocab_size: int) -> frozenset[int]:
    """The ids of generation_config.json if that file exists, else those of config.json."""
    source, file_name = (raw, "config.json") if generation is None else (generation, "generation_config.json")
    given = source.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for token_id in ids:
        if not is_int(token_id):
            raise ValueError(f"eos_token_id ({file_name}) must be an integer or a list of integers, got {given!r}")
    eos_token_ids = frozenset(token_id for token_id in ids if 0 <= token_id < vocab_size)
    if len(eos_token_ids) < len(set(ids)):
        where = f"{file_name} names ids outside the vocabulary (0 to {vocab_size - 1})"
        logger.warning("eos_token_id %r of %s: these end no text", given, where)
    return eos_token_ids


def _tokenizer_class(raw: RawConfig) -> str | None:
    name = raw.get("tokenizer_class")
    if not isinstance(name, (str, type(None))):
        raise ValueError(f"tokenizer_class must be a string, got {name!r}")
    return name
