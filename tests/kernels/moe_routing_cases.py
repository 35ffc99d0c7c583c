"""Cases of moe_routing for a device: see tests/support/kernels/interpreting.py. The kernel is imported late, for triton."""

from dataclasses import dataclass
from functools import partial

import torch

from tests.support.kernels.accuracy import counted
from tests.support.kernels.interpreting import Guards


@dataclass(frozen=True)
class Case:
    """scale 0 makes all logits equal, and offset is added to all. row_padding: columns between two rows."""

    num_tokens: int
    num_experts: int
    top_k: int
    norm_topk_prob: bool = True
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    offset: float = 0.0
    row_padding: int = 3
    tile_size: int = 64
    chunk_size: int = 16
    seed: int = 0


CASES = {
    "one token": Case(1, 8, 2),
    "one expert": Case(5, 1, 1),
    "every expert is chosen": Case(7, 6, 6),
    "experts are no power of two": Case(13, 12, 3),
    "weights are not renormalised": Case(13, 12, 3, norm_topk_prob=False),
    "more experts than assignments": Case(3, 40, 2),
    "one assignment a block": Case(9, 5, 2, block_size=1),
    "one block an expert": Case(9, 5, 2, block_size=32),
    "equal logits": Case(11, 6, 2, scale=0.0),
    "logits whose exponentials overflow": Case(11, 6, 2, offset=200.0),
    "logits whose exponentials vanish": Case(11, 6, 2, offset=-200.0),
    "assignments fill chunks": Case(16, 8, 2, chunk_size=32),
    "one token a tile": Case(6, 12, 3, tile_size=8),
    "float16": Case(13, 12, 3, dtype=torch.float16),
    "bfloat16": Case(13, 12, 3, dtype=torch.bfloat16),  # cast up when loaded, so right in the interpreter too
}


def check(case: Case, device: str) -> None:
    """Raise AssertionError unless weights, order and blocks are those of `expect`, and nothing else is written."""
    from nanovllm.kernels.moe_routing import moe_routing

    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.num_tokens, case.num_experts + case.row_padding)
    wide = case.scale * torch.randn(shape, generator=generator) + case.offset
    wide[:, case.num_experts :] = 1e4  # an expert that is read from beyond the last would be chosen
    logits = wide.to(case.dtype)[:, : case.num_experts]
    guards = Guards(device)
    guarded = guards.read(logits)
    with guards:
        routing = moe_routing(
            guarded,
            case.top_k,
            case.norm_topk_prob,
            case.block_size,
            tile_size=case.tile_size,
            chunk_size=case.chunk_size,
        )
    guards.assert_intact()
    weights, experts, sorted_assignments, block_experts = expect(logits, case)
    assert torch.equal(routing.experts.cpu(), experts)
    # Softmax in float32: a few roundings of numbers below 1, and of the exponential's argument.
    torch.testing.assert_close(routing.weights.cpu().double(), weights, rtol=2e-6, atol=0)
    assert routing.num_blocks.tolist() == [len(block_experts)]
    unwritten = torch.iinfo(torch.int32).max
    padded = [*sorted_assignments, *[unwritten] * (len(routing.sorted_assignments) - len(sorted_assignments))]
    assert routing.sorted_assignments.tolist() == padded
    padded = [*block_experts, *[unwritten] * (len(routing.block_experts) - len(block_experts))]
    assert routing.block_experts.tolist() == padded
    for output in (routing.experts, routing.weights, routing.sorted_assignments, routing.block_experts):
        counted("moe_routing", output)


def expect(logits: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Routing's first four fields by reference.moe's formulas and a loop over experts, without unwritten ends."""
    probability = logits.double().softmax(dim=1)
    experts = logits.double().argsort(dim=1, descending=True, stable=True)[:, : case.top_k]
    weights = probability.gather(1, experts)
    if case.norm_topk_prob:
        weights = weights / weights.sum(dim=1, keepdim=True)
    chosen = experts.flatten().tolist()
    sorted_assignments, block_experts = [], []
    for expert in range(case.num_experts):
        own = [assignment for assignment, other in enumerate(chosen) if other == expert]
        own += [len(chosen)] * (-len(own) % case.block_size)
        sorted_assignments += own
        block_experts += [expert] * (len(own) // case.block_size)
    return weights, experts.int(), sorted_assignments, block_experts


def check_nan(device: str) -> None:
    """NaN makes the weights of its token NaN, and of no other; every expert stays within bounds and is another one."""
    from nanovllm.kernels.moe_routing import moe_routing

    logits = torch.arange(24.0).view(3, 8)
    logits[1, 5] = torch.nan
    logits[1, 6] = torch.inf
    routing = moe_routing(logits.to(device), 3, True, 4)
    assert routing.weights.isnan().all(dim=1).tolist() == [False, True, False]
    assert routing.experts.tolist() == [[7, 6, 5], [5, 6, 7], [7, 6, 5]]


CHECKS = {**{name: partial(check, case) for name, case in CASES.items()}, "NaN": check_nan}
