"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from typing import overload

import torch
from torch import nn

from nanovllm.layers.kernel_choice import has_kernels
from nanovllm.layers.parameter import load_replicated, make_parameter


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x ** 2) + eps) * weight over the last dimension.

    Mean and division in float32 or wider, the product with weight in x's dtype, which is how the models were trained.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter((size,), load_replicated)

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """y; with a residual, (y of x + residual, x + residual). Inputs are left as they are."""
        if has_kernels(x) and x.ndim in (2, 3):
            from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm  # imports triton

            if residual is None:
                return rms_norm(x, self.weight, self.eps)
            return add_rms_norm(x, residual, self.weight, self.eps)
        if residual is not None:
            x = x + residual
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        y = self.weight * wide.to(x.dtype)
        return y if residual is None else (y, x)
