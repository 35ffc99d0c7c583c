"""Cases of moe_routing against reference.moe's routing, to the bit but for the weights."""

from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.arithmetic import Work
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from tests.support.kernels.accuracy import counted
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import EVERY_TARGET, Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

moe_routing = lazy("moe_routing.moe_routing")
choose_tile_config = lazy("grouped_gemm.choose_tile_config")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    logits = torch.arange(24.0).view(3, 8)
    logits[1, 5] = torch.nan
    logits[1, 6] = torch.inf
    routing = moe_routing(logits.to(device), 3, True, 4)
    assert routing.weights.isnan().all(dim=1).tolist() == [False, True, False]
    assert routing.experts.tolist() == [[7, 6, 5], [5, 6, 7], [7, 6, 5]]


def check_used_tiles(num_tokens: int, device: str) -> None:
    """The tile and chunk sizes that the launcher takes by itself."""
    from nanovllm.kernels.moe_routing import CHUNK_SIZE, TILE_SIZE

    check(Case(num_tokens, 128, 8, tile_size=TILE_SIZE, chunk_size=CHUNK_SIZE, block_size=64), device)


def launch_with_60_experts(num_tokens: int) -> None:
    """Four a token: no limit is at a power of two."""
    moe_routing(meta(num_tokens, 60), 4, True, choose_tile_config(num_tokens * 4, 60, 2).rows)


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


KERNEL = Kernel(
    name="moe_routing",
    launched={
        "choose_experts_kernel": Limits(max_registers=128, max_shared_bytes=16 * 1024),
        "sort_assignments_kernel": Limits(max_shared_bytes=32 * 1024),
    },
    cases={name: partial(check, case) for name, case in CASES.items()} | {"NaN": check_nan},
    on_gpu={f"tile sizes that are used, {n} tokens": partial(check_used_tiles, n) for n in (1, 64, 2000)},
    drawn=st.builds(  # half-precision logits of many tokens tie often
        lambda num_tokens, num_experts, top_k, norm, log2_size, dtype, seed: partial(
            check, Case(num_tokens, num_experts, min(top_k, num_experts), norm, 2**log2_size, dtype, seed=seed)
        ),
        st.integers(1, 600),
        st.integers(1, 130),
        st.integers(1, 9),
        st.booleans(),
        st.integers(0, 7),
        st.sampled_from(DTYPES),
        st.integers(0, 2**16),
    ),
    compiled={
        f"{num_tokens} tokens": Compilation(
            lambda dtype, _, num_tokens=num_tokens: moe_routing(meta(num_tokens, 128, dtype=dtype), 8, True, 16),
            EVERY_TARGET,
        )
        for num_tokens in (1, 64, 16_384)
    },
    refused=Refusals(
        moe_routing,
        lambda: {"router_logits": torch.zeros(3, 4), "top_k": 2, "norm_topk_prob": True, "block_size": 16},
        (
            ({"router_logits": torch.zeros(3, 4).double()}, "bfloat16, float16 or float32, got torch.float64"),
            ({"router_logits": torch.zeros(0, 4)}, "must have a row or more"),
            ({"router_logits": torch.zeros(4, 3).T}, "contiguous last dimension"),
            ({"top_k": 5}, "top_k must be from 1 to the number of experts, 4, got 5"),
            ({"top_k": 0}, "top_k must be from 1"),
            ({"block_size": 12}, "must be powers of two, got 12"),
        ),
    ),
    steps={
        # tiles of 1, 2, 4 and 16 tokens; eight sizes of a chunk
        "128 experts": Steps(lambda num_tokens: moe_routing(meta(num_tokens, 128), 8, True, 16), max_variants=12),
        "60 experts": Steps(launch_with_60_experts, None, met_at_start=True),
    },
    measured={"moe_routing": measured},
    reached_by="qwen3_moe",
)
