"""Qwen3 (arXiv 2505.09388): queries and keys are normalised head by head before they are rotated."""

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.ops import LayerOps
from nanovllm.model_config import ModelConfig
from nanovllm.models.decoder import DecoderForCausalLM, SelfAttention


class Qwen3SelfAttention(SelfAttention):
    def __init__(self, config: ModelConfig, ops: LayerOps, tp: TensorParallel) -> None:
        super().__init__(config, ops, tp)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)

    def head_norms(self) -> tuple[RMSNorm, RMSNorm]:
        return self.q_norm, self.k_norm


class Qwen3ForCausalLM(DecoderForCausalLM):
    def build_self_attn(self, config: ModelConfig, ops: LayerOps, tp: TensorParallel) -> SelfAttention:
        return Qwen3SelfAttention(config, ops, tp)
