"""Which class serves which model_type."""

import torch

from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.layers.ops import LayerOps
from nanovllm.layers.parameter import parameter_dtype
from nanovllm.model_config import ModelConfig
from nanovllm.models.decoder import DecoderForCausalLM
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM

model_dict: dict[str, type[DecoderForCausalLM]] = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
}


def build_model(config: ModelConfig, ops: LayerOps, tp: TensorParallel = SINGLE_RANK) -> DecoderForCausalLM:
    """The model, its parameters uninitialised, of config.dtype, on torch's default device (`with torch.device(...)`).

    Raises ValueError for a model_type that is not in model_dict, and when the ranks cannot share the model evenly.
    """
    if config.model_type not in model_dict:
        raise ValueError(f"model_type must be one of {', '.join(model_dict)}, got {config.model_type!r}")
    config.check_tensor_parallel_size(tp.size)
    with parameter_dtype(getattr(torch, config.dtype)):
        return model_dict[config.model_type](config, ops, tp)
