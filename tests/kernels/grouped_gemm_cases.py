"""Cases of grouped_gemm for a device: see tests/support/kernels/interpreting.py. The kernel is imported late, for triton."""

from dataclasses import dataclass
from functools import partial

import torch

from nanovllm.layers.moe import Experts
from nanovllm.layers.tensor_parallel import SINGLE_RANK
from reference.moe import moe
from tests.support.kernels.accuracy import assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.interpreting import Guards


@dataclass(frozen=True)
class Case:
    """Tiles are (rows, columns, inner). unused_experts: the last ones, whose weights are NaN."""

    num_tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype = torch.float32
    norm_topk_prob: bool = True
    unused_experts: int = 0
    tiles: tuple[int, int, int] | None = (16, 16, 16)
    seed: int = 0


CASES = {
    "one token": Case(1, 4, 2, 32, 16),
    "one expert": Case(5, 1, 1, 16, 16),
    "ragged sizes": Case(7, 4, 2, 20, 12),
    "smaller than a tile": Case(3, 4, 3, 4, 6),
    "several blocks an expert": Case(40, 2, 2, 16, 16),
    "several tiles of columns and steps": Case(5, 3, 2, 80, 48, tiles=(16, 32, 16)),
    "weights are not renormalised": Case(6, 5, 2, 16, 8, norm_topk_prob=False),
    "experts that nobody chose are NaN": Case(6, 8, 2, 16, 8, unused_experts=4),
    "float16": Case(9, 4, 2, 48, 24, dtype=torch.float16),
    "float16, ragged": Case(9, 4, 2, 20, 12, dtype=torch.float16),
}


@dataclass(frozen=True)
class Layer:
    """hidden_states [T, E], router [N, E] float32, gate_up_proj [N, 2 * F, E], down_proj [N, E, F] of a case."""

    hidden_states: torch.Tensor
    router: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor


def make_layer(case: Case, device: str = "cpu") -> Layer:
    """Normal numbers, scaled so that activations stay about 1. The router's logits fall where experts are unused."""
    generator = torch.Generator(device).manual_seed(case.seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    n, e, f = case.num_experts, case.hidden_size, case.intermediate_size
    hidden_states, router = randn(case.num_tokens, e), randn(n, e)
    hidden_states[:, 0] = 4.0
    gate_up_proj, down_proj = randn(n, 2 * f, e) * e**-0.5, randn(n, e, f) * f**-0.5
    if case.unused_experts:
        router[-case.unused_experts :, 0] = -1000.0
        gate_up_proj[-case.unused_experts :], down_proj[-case.unused_experts :] = torch.nan, torch.nan
    dtype = case.dtype
    return Layer(hidden_states.to(dtype), router.to(dtype).float(), gate_up_proj.to(dtype), down_proj.to(dtype))


def router_logits(layer: Layer) -> torch.Tensor:
    """[T, N] float32, of float64: what moe_routing gets, so that it chooses as the reference does."""
    return (layer.hidden_states.double() @ layer.router.double().T).float()


def expected_output(case: Case, layer: Layer) -> torch.Tensor:
    """reference.moe in float64. It multiplies all experts, so the unused ones are 0 instead of NaN."""
    gate_up_proj, down_proj = layer.gate_up_proj.double().nan_to_num(), layer.down_proj.double().nan_to_num()
    hidden_states, router = layer.hidden_states.double(), layer.router.double()
    return moe(hidden_states, router, gate_up_proj, down_proj, case.top_k, case.norm_topk_prob)


def plain_output(case: Case, layer: Layer) -> torch.Tensor:
    """The same in plain PyTorch and the case's dtype."""
    experts = Experts(case.num_experts, case.hidden_size, case.intermediate_size, SINGLE_RANK)
    experts = experts.to(layer.hidden_states.device, case.dtype)
    experts.gate_up_proj.weight.data, experts.down_proj.weight.data = layer.gate_up_proj, layer.down_proj
    weights, chosen = router_logits(layer).softmax(dim=1).topk(case.top_k)
    if case.norm_topk_prob:
        weights = weights / weights.sum(dim=1, keepdim=True)
    with torch.inference_mode():
        return experts(layer.hidden_states, chosen, weights.to(case.dtype))


def check(case: Case, device: str) -> None:
    """Raise AssertionError unless the output is reference.moe's, and nothing else is written."""
    from nanovllm.kernels.grouped_gemm import Tiles, grouped_gemm, grouped_gemm_tiles
    from nanovllm.kernels.moe_routing import moe_routing

    layer = make_layer(case, device)
    num_assignments = case.num_tokens * case.top_k
    if case.tiles is None:
        tiles = grouped_gemm_tiles(num_assignments, case.num_experts, layer.hidden_states.element_size())
    else:
        tiles = Tiles(*case.tiles, warps=4, stages=3)
    guards = Guards(device)
    arguments = [guards.read(tensor) for tensor in (layer.hidden_states, layer.gate_up_proj, layer.down_proj)]
    with guards:
        routing = moe_routing(router_logits(layer), case.top_k, case.norm_topk_prob, tiles.rows)
        output = grouped_gemm(*arguments, routing, tiles=tiles)
    guards.assert_intact()
    exact, plain = expected_output(case, layer), plain_output(case, layer)
    assert_within_twice_the_error_of_plain_torch("grouped_gemm", output, plain, exact)


CHECKS = {name: partial(check, case) for name, case in CASES.items()}
