"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with experts in the layers that ModelConfig names."""

from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.moe import SparseMoeBlock
from nanovllm.layers.ops import LayerOps
from nanovllm.model_config import ModelConfig
from nanovllm.models.decoder import MLP
from nanovllm.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    def build_mlp(self, config: ModelConfig, layer_index: int, ops: LayerOps, tp: TensorParallel) -> nn.Module:
        if config.moe is not None and layer_index in config.moe.layers:
            return SparseMoeBlock(config.hidden_size, config.moe, ops, tp)
        return MLP(config, ops, tp)
