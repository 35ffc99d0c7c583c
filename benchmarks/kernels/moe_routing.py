"""What is measured of moe_routing."""

import torch

from benchmarks.arithmetic import Work
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from tests.support.kernels.registry import lazy

moe_routing = lazy("moe_routing.moe_routing")
choose_tile_config = lazy("grouped_gemm.choose_tile_config")


def measured(shape: Shape, num_tokens: int) -> Measured:
    num_experts, top_k = shape.num_experts, shape.top_k

    def make(index: int) -> tuple[torch.Tensor]:
        # float32, in which no two logits of a row are equal: torch.topk promises nothing for ties
        generator = torch.Generator("cuda").manual_seed(index)
        return (torch.randn(num_tokens, num_experts, device="cuda", generator=generator),)

    def run(logits):
        routing = moe_routing(logits, top_k, True, choose_tile_config(num_tokens * top_k, num_experts, 2).rows)
        return routing.weights, routing.experts

    def choose(logits):
        weights, experts = logits.softmax(dim=1, dtype=torch.float32).topk(top_k, dim=1)
        return weights / weights.sum(dim=1, keepdim=True), experts

    def plain(logits):
        weights, experts = choose(logits)
        experts.flatten().sort(stable=True)  # what the grouped product needs
        return weights, experts

    # float32 logits in; out come a float32 weight and two int32, expert and place, for each choice
    work = Work(num_tokens * num_experts * 4, 12 * num_tokens * top_k)
    return Measured(make=make, run=run, expected=choose, work=work, peers={"torch": plain})
