"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from torch import Tensor, nn

from nanovllm.layers.ops import LayerOps
from nanovllm.layers.parameter import load_replicated, make_parameter
from nanovllm.layers.torch_ops import TORCH_OPS


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x ** 2) + eps) * weight over the last dimension of [T, size] or [T, heads, size]."""

    def __init__(self, size: int, eps: float = 1e-6, ops: LayerOps = TORCH_OPS) -> None:
        super().__init__()
        self.eps = eps
        self.ops = ops
        self.weight = make_parameter((size,), load_replicated)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y; with a residual, (y of x + residual, x + residual). Inputs are left as they are."""
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
