"""The activation between gate_up_proj and down_proj."""

import torch
from torch import nn
from torch.nn import functional

from nanovllm.layers.kernel_choice import has_kernels


class SiluAndMul(nn.Module):
    """silu(first half) * second half (Shazeer 2020, arXiv 2002.05202): [..., 2 * F] -> [..., F]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if has_kernels(x) and x.ndim == 2:
            from nanovllm.kernels.silu_and_mul import silu_and_mul  # imports triton

            return silu_and_mul(x)
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up
