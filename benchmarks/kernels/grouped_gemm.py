"""What is measured of grouped_gemm."""

from functools import partial

import torch
from torch.nn import functional

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from tests.support.kernels.registry import lazy

grouped_gemm = lazy("grouped_gemm.grouped_gemm")
choose_tile_config = lazy("grouped_gemm.choose_tile_config")
moe_routing = lazy("moe_routing.moe_routing")


def measured(shape: Shape, num_tokens: int) -> Measured:
    num_experts, top_k, size, inner = shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size

    def make(index: int) -> tuple:
        x, logits = randn(index, num_tokens, size), randn(index + 1, num_tokens, num_experts)
        gate_up, down = randn(index, num_experts, 2 * inner, size) * 0.02, randn(index, num_experts, size, inner) * 0.02
        block_size = choose_tile_config(num_tokens * top_k, num_experts, 2).rows
        return x, gate_up, down, moe_routing(logits, top_k, True, block_size)

    def plain(x, gate_up, down, routing, dtype=torch.bfloat16):
        """Every expert on every token: what plain PyTorch can do without asking the host which experts were chosen."""
        gate, up = torch.matmul(x.to(dtype), gate_up.to(dtype).transpose(1, 2)).chunk(2, dim=2)
        products = torch.bmm(functional.silu(gate) * up, down.to(dtype).transpose(1, 2))
        weights = torch.zeros(num_tokens, num_experts, device="cuda").scatter_(
            1, routing.experts.long(), routing.weights
        )
        return torch.einsum("nte,tn->te", products, weights.to(dtype))

    *_, routing = make(0)
    num_experts_hit = len(routing.experts.unique())
    # two roundings to bfloat16 before the sum over experts, and plain PyTorch rounds a third time
    work, peers = work_of_experts(num_tokens, num_experts_hit, top_k, size, inner), {"torch": plain}
    expected = partial(plain, dtype=torch.float32)
    return Measured(make=make, run=grouped_gemm, expected=expected, work=work, peers=peers, tolerance=2e-2)


def work_of_experts(num_tokens: int, num_experts_hit: int, top_k: int, size: int, inner: int) -> Work:
    """6 T top_k E F operations; the three matrices of every expert that a token chose, tokens in, tokens out."""
    num_bytes = num_tokens * size * 2
    return Work(num_experts_hit * 3 * size * inner * 2 + num_bytes, num_bytes, 6 * num_tokens * top_k * size * inner)
