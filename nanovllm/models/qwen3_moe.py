"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with experts in some layers or all."""

from dataclasses import replace

from nanovllm.config_json import RawConfig, get_bool, get_int, get_list
from nanovllm.model_config import Architecture, LayerOptions, MoEConfig
from nanovllm.models import qwen3
from nanovllm.validation import require_int


def read_layer_options(raw: RawConfig) -> LayerOptions:
    return replace(qwen3.read_layer_options(raw), moe=read_moe(raw))


def read_moe(raw: RawConfig) -> MoEConfig | None:
    """The experts, from either layout of config.json; None if no layer has any."""
    counts = {key: get_int(raw, key, minimum=0) for key in ("num_experts", "num_local_experts") if key in raw}
    if len(set(counts.values())) != 1:
        raise ValueError(f"num_experts (or num_local_experts) must be given, and once, got {counts or 'neither'}")
    num_experts = next(iter(counts.values()))
    step = get_int(raw, "decoder_sparse_step", 1)
    mlp_only_layers = get_list(raw, "mlp_only_layers")
    layers = range(get_int(raw, "num_hidden_layers"))
    sparse = frozenset(layer for layer in layers if layer not in mlp_only_layers and (layer + 1) % step == 0)
    if num_experts == 0 or not sparse:
        return None
    num_experts_per_tok = get_int(raw, "num_experts_per_tok")
    require_int("num_experts_per_tok", num_experts_per_tok, 1, num_experts, remedy="there are no more experts")
    return MoEConfig(
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=get_int(raw, "moe_intermediate_size"),
        norm_topk_prob=get_bool(raw, "norm_topk_prob"),
        layers=sparse,
    )


ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    default_max_position_embeddings=32768,
    read_layer_options=read_layer_options,
)
