"""Cases of moe_routing against reference.moe's routing, to the bit but for the weights."""

from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.kernels.moe_routing import measured
from tests.support.kernels.accuracy import counted
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, lazy, meta

moe_routing = lazy("moe_routing.moe_routing")
choose_tile_config = lazy("grouped_gemm.choose_tile_config")


@case
def check(
    device: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    norm_topk_prob: bool = True,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    offset: float = 0.0,
    seed: int = 0,
    **tiles: int,
) -> None:
    """Weights, order and blocks are those of `expect`.

    scale 0 makes all logits equal, and offset is added to all. Rows stand 3 columns apart.
    """
    top_k = min(top_k, num_experts)
    wide = scale * torch.randn(num_tokens, num_experts + 3, generator=torch.Generator().manual_seed(seed)) + offset
    wide[:, num_experts:] = 1e4  # an expert that is read from beyond the last would be chosen
    logits = wide.to(dtype)[:, :num_experts]
    guards = Guards(device)
    guarded = guards.read(logits)
    with guards:
        routing = moe_routing(guarded, top_k, norm_topk_prob, block_size, **tiles)
    weights, experts, sorted_assignments, block_experts = expect(logits, top_k, norm_topk_prob, block_size)
    assert torch.equal(routing.experts.cpu(), experts)
    # Softmax in float32: a few roundings of numbers below 1, and of the exponential's argument.
    torch.testing.assert_close(routing.weights.cpu().double(), weights, rtol=2e-6, atol=0)
    assert routing.num_blocks.tolist() == [len(block_experts)]
    for actual, expected in ((routing.sorted_assignments, sorted_assignments), (routing.block_experts, block_experts)):
        unwritten = [torch.iinfo(torch.int32).max] * (len(actual) - len(expected))
        assert actual.tolist() == expected + unwritten
    for output in (routing.experts, routing.weights, routing.sorted_assignments, routing.block_experts):
        counted("moe_routing", output)


def expect(
    logits: torch.Tensor, top_k: int, norm_topk_prob: bool, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Routing's first four fields by reference.moe's formulas and a loop over experts, without unwritten ends."""
    probability = logits.double().softmax(dim=1)
    experts = logits.double().argsort(dim=1, descending=True, stable=True)[:, :top_k]
    weights = probability.gather(1, experts)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=1, keepdim=True)
    chosen = experts.flatten().tolist()
    sorted_assignments, block_experts = [], []
    for expert in range(logits.shape[1]):
        own = [assignment for assignment, other in enumerate(chosen) if other == expert]
        own += [len(chosen)] * (-len(own) % block_size)
        sorted_assignments += own
        block_experts += [expert] * (len(own) // block_size)
    return weights, experts.int(), sorted_assignments, block_experts


def check_nan(device: str) -> None:
    """NaN makes the weights of its token NaN, and of no other; every expert stays within bounds and is another one."""
    logits = torch.arange(24.0).view(3, 8)
    logits[1, 5] = torch.nan
    logits[1, 6] = torch.inf
    routing = moe_routing(logits.to(device), 3, True, 4)
    assert routing.weights.isnan().all(dim=1).tolist() == [False, True, False]
    assert routing.experts.tolist() == [[7, 6, 5], [5, 6, 7], [7, 6, 5]]


small_tiles = partial(check, tile_size=64, chunk_size=16)
CASES = {
    "one token": small_tiles(1, 8, 2),
    "one expert": small_tiles(5, 1, 1),
    "every expert is chosen": small_tiles(7, 6, 6),
    "weights are not renormalised": small_tiles(13, 12, 3, norm_topk_prob=False),
    "more experts than assignments": small_tiles(3, 40, 2),
    "one assignment a block": small_tiles(9, 5, 2, block_size=1),
    "one block an expert": small_tiles(9, 5, 2, block_size=32),
    "equal logits": small_tiles(11, 6, 2, scale=0.0),
    "logits whose exponentials overflow": small_tiles(11, 6, 2, offset=200.0),
    "logits whose exponentials vanish": small_tiles(11, 6, 2, offset=-200.0),
    "assignments fill chunks": small_tiles(16, 8, 2, chunk_size=32),
    "one token a tile": small_tiles(6, 12, 3, tile_size=8),
    "float16": small_tiles(13, 12, 3, dtype=torch.float16),
    "bfloat16": small_tiles(13, 12, 3, dtype=torch.bfloat16),  # cast up when loaded, so right in the interpreter too
    "NaN": check_nan,
}


def launch(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    moe_routing(meta(num_tokens, 128, dtype=dtype), 8, True, 16)


def launch_with_60_experts(num_tokens: int) -> None:
    """Four a token: no limit is at a power of two."""
    moe_routing(meta(num_tokens, 60), 4, True, choose_tile_config(num_tokens * 4, 60, 2).rows)


KERNEL = Kernel(
    name="moe_routing",
    launched={
        "choose_experts_kernel": Limits(max_registers=128, max_shared_bytes=16 * 1024),
        "sort_assignments_kernel": Limits(max_shared_bytes=32 * 1024),
    },
    cases=CASES,
    on_gpu={f"{n} tokens": check(n, 128, 8, block_size=64) for n in (1, 64, 2000)},
    drawn=st.builds(  # half-precision logits of many tokens tie often
        small_tiles,
        st.integers(1, 600),
        st.integers(1, 130),
        st.integers(1, 9),
        st.booleans(),
        st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]),
        st.sampled_from(DTYPES),
        seed=st.integers(0, 2**16),
    ),
    compiled={f"{n} tokens": Compilation(lambda dtype, _, n=n: launch(n, dtype)) for n in (1, 64, 16_384)},
    refused=Refused(
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
        "128 experts": Steps(launch, max_variants=12),
        "60 experts": Steps(launch_with_60_experts, None, met_at_start=True),
    },
    measured={"moe_routing": measured},
    reached_by="qwen3_moe",
)
