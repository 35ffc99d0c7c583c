"""MoEConfig: the mixture of experts of a checkpoint, read for ModelConfig from either layout of config.json."""

from dataclasses import dataclass
from typing import Any

from nanovllm.config_json import get_bool, get_int, get_list
from nanovllm.validation import require_int


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts. layers: indices of the layers that have experts; the others have a dense MLP."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    layers: frozenset[int]


def read_moe(raw: dict[str, Any]) -> MoEConfig | None:
    """None for a model in which no layer has experts. Raises ValueError for a key that is missing or wrong."""
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
