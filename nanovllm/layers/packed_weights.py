"""pack_weights: the matrices of linear layers in oneDNN's own layout, with which a CPU multiplies faster.

A decode step reads every matrix for a few tokens. torch's matrix product takes it row by row as it is; oneDNN would
rather have blocks that fit its registers, and rearranges a matrix once instead of at each product. All matrices of
SmolLM2-135M took, in milliseconds on one core of an AMD EPYC with AVX-512, as they were and packed: for 1 token 25 and
20 in float32, 18 and 12 in bfloat16; for 8 tokens 45 and 22, 23 and 14 (12 of its layers, torch 2.13).
"""

import platform

import torch
from torch import nn

from nanovllm.layers.embedding import ParallelLMHead
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.ops import LayerOps
from nanovllm.layers.torch_ops import TORCH_OPS

# Elements of a matrix. Smaller ones stay in a core's cache as they are, and oneDNN takes half a millisecond to prepare
# a product for each number of tokens that is new.
MIN_SIZE = 300_000


def pack_weights(model: nn.Module, ops: LayerOps) -> None:
    """Replace the loaded weights of linear layers by packed ones, if ops is TORCH_OPS, where can_pack says so.

    A packed weight has the shape of the matrix, but no elements that could be read: torch_ops.linear takes it. The
    memory of the other is freed, except for a matrix that is the embedding too.
    """
    if ops is not TORCH_OPS:
        return
    for module in model.modules():
        if isinstance(module, (LinearBase, ParallelLMHead)) and can_pack(module.weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
            module.weight = nn.Parameter(packed, requires_grad=False)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine's oneDNN multiplies with a packed `weight`, and that pays. Measured on x86 alone."""
    if not weight.is_cpu or weight.numel() < MIN_SIZE or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    is_fast_bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or is_fast_bfloat16
