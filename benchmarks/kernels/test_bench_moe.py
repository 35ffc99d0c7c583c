"""Mixture of experts at Qwen3-30B-A3B's shape: choosing experts and sorting tokens, and the experts' matrices."""

import pytest
import torch
from torch.nn import functional

from benchmarks import arithmetic
from benchmarks.kernels.inputs import randn
from benchmarks.shapes import NUM_SEQS, SHAPES

SHAPE = SHAPES["qwen3-30b-a3b"]
NUM_TOKENS = (*NUM_SEQS, 4096)
ITEMSIZE = 2


def choose(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts) of each token, the most probable first."""
    weights, experts = logits.softmax(dim=1, dtype=torch.float32).topk(SHAPE.top_k, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), experts


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_moe_routing(measure, num_tokens):
    from nanovllm.kernels.grouped_gemm import grouped_gemm_tiles
    from nanovllm.kernels.moe_routing import moe_routing

    block_size = grouped_gemm_tiles(num_tokens * SHAPE.top_k, SHAPE.num_experts, ITEMSIZE).rows

    def make(index: int) -> tuple[torch.Tensor]:
        # float32, in which no two logits of a row are equal: torch.topk promises nothing for ties
        generator = torch.Generator("cuda").manual_seed(index)
        return (torch.randn(num_tokens, SHAPE.num_experts, device="cuda", generator=generator),)

    def run(logits):
        routing = moe_routing(logits, SHAPE.top_k, True, block_size)
        return routing.weights, routing.experts

    def plain(logits):
        weights, experts = choose(logits)
        experts.flatten().sort(stable=True)  # what the grouped product needs
        return weights, experts

    measure(
        "moe_routing",
        f"{num_tokens} tokens, 8 of 128",
        make=make,
        run=run,
        expected=choose,
        work=arithmetic.moe_routing(num_tokens, SHAPE.num_experts, SHAPE.top_k, itemsize=4),
        peers={"torch": plain},
    )


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_grouped_gemm(measure, num_tokens):
    from nanovllm.kernels.grouped_gemm import grouped_gemm, grouped_gemm_tiles
    from nanovllm.kernels.moe_routing import moe_routing

    num_experts, top_k, size, inner = SHAPE.num_experts, SHAPE.top_k, SHAPE.hidden_size, SHAPE.intermediate_size
    block_size = grouped_gemm_tiles(num_tokens * top_k, num_experts, ITEMSIZE).rows

    def make(index: int) -> tuple:
        x = randn(index, num_tokens, size)
        logits = randn(index + 1, num_tokens, num_experts)
        gate_up, down = randn(index, num_experts, 2 * inner, size) * 0.02, randn(index, num_experts, size, inner) * 0.02
        return x, gate_up, down, moe_routing(logits, top_k, True, block_size)

    def expected(x, gate_up, down, routing):
        """Expert by expert, in float32."""
        output = torch.zeros_like(x, dtype=torch.float32)
        for expert in routing.experts.unique().tolist():
            token, choice = torch.where(routing.experts == expert)
            gate, up = functional.linear(x[token].float(), gate_up[expert].float()).chunk(2, dim=1)
            hidden = functional.linear(functional.silu(gate) * up, down[expert].float())
            output.index_add_(0, token, hidden * routing.weights[token, choice, None])
        return output

    def plain(x, gate_up, down, routing):
        """Every expert on every token: what plain PyTorch can do without asking the host who was chosen."""
        gate, up = torch.matmul(x, gate_up.transpose(1, 2)).chunk(2, dim=2)
        products = torch.bmm(functional.silu(gate) * up, down.transpose(1, 2))
        weights = torch.zeros(num_tokens, num_experts, device="cuda").scatter_(
            1, routing.experts.long(), routing.weights
        )
        return torch.einsum("nte,tn->te", products, weights.to(products.dtype))

    first = make(0)
    num_experts_hit = len(first[-1].experts.unique())
    del first
    measure(
        "grouped_gemm",
        f"{num_tokens} tokens, 8 of 128 experts",
        make=make,
        run=grouped_gemm,
        expected=expected,
        work=arithmetic.moe_experts(num_tokens, num_experts_hit, top_k, size, inner),
        peers={"torch": plain},
        tolerance=2e-2,  # two roundings to bfloat16 before the sum over experts, and plain PyTorch rounds a third time
    )
