"""The activation between gate_up_proj and down_proj."""

import torch
from torch import nn
from torch.nn import functional


class SiluAndMul(nn.Module):
    """silu(first half) * second half (Shazeer 2020, arXiv 2002.05202): [..., 2 * F] -> [..., F]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up
