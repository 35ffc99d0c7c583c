"""The activation between gate_up_proj and down_proj."""

import torch
from torch import nn

from nanovllm.layers.ops import LayerOps
from nanovllm.layers.torch_ops import TORCH_OPS


class SiluAndMul(nn.Module):
    """silu(first half) * second half (Shazeer 2020, arXiv 2002.05202): [T, 2 * F] -> [T, F]."""

    def __init__(self, ops: LayerOps = TORCH_OPS) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.silu_and_mul(x)
