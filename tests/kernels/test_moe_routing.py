"""moe_routing against reference.moe's routing: interpreted on the CPU, compiled without a GPU, run on a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import moe_routing_cases as cases
from tests.support.kernels.compiling import CAPABILITIES, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_interpreted():
    run_interpreted(cases.__name__)


@CAPABILITIES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 16_384])
def test_compiled(capability, dtype, num_tokens):
    """Qwen3-30B-A3B's 128 experts, of which 8 are chosen."""
    from nanovllm.kernels.moe_routing import moe_routing

    logits = torch.empty(num_tokens, 128, dtype=dtype, device="meta")
    choose, sort = compile_launches(lambda: moe_routing(logits, 8, True, 16), capability)
    assert_fits(choose, max_registers=128, max_shared_bytes=16 * 1024)
    assert_fits(sort, max_registers=255, max_shared_bytes=32 * 1024)


@pytest.mark.parametrize(
    ("num_assignments", "num_experts", "block_size"), [(1, 1, 1), (9, 4, 4), (3, 7, 2), (40, 3, 16), (17, 16, 4)]
)
def test_no_routing_needs_more_blocks_than_there_is_room_for(num_assignments, num_experts, block_size):
    """And one needs as many: tried for every way of spreading the assignments, largest expert first."""
    from nanovllm.kernels.moe_routing import max_num_blocks

    def most(left: int, experts: int, at_most: int) -> int:
        if left == 0 or experts == 0:
            return 0 if left == 0 else -1000
        return max(
            -(-own // block_size) + most(left - own, experts - 1, own) for own in range(1, min(left, at_most) + 1)
        )

    assert max_num_blocks(num_assignments, num_experts, block_size) == most(
        num_assignments, num_experts, num_assignments
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4, dtype=torch.float64), 2, True, 16), "bfloat16, float16 or float32, got torch.float64"),
        ((torch.zeros(0, 4), 2, True, 16), "must have a row or more"),
        ((torch.zeros(4, 3).T, 2, True, 16), "contiguous last dimension"),
        ((torch.zeros(3, 4), 5, True, 16), "top_k must be from 1 to the number of experts, 4, got 5"),
        ((torch.zeros(3, 4), 0, True, 16), "top_k must be from 1"),
        ((torch.zeros(3, 4), 2, True, 12), "must be powers of two, got 12"),
    ],
)
def test_what_the_contract_excludes_is_refused(arguments, message):
    from nanovllm.kernels.moe_routing import moe_routing

    with pytest.raises(ValueError, match=message):
        moe_routing(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    cases.CHECKS[name]("cuda")


@pytest.mark.gpu
@given(
    num_tokens=st.integers(1, 600),
    num_experts=st.integers(1, 130),
    top_k=st.integers(1, 9),
    norm_topk_prob=st.booleans(),
    log2_block_size=st.integers(0, 7),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_random_shapes_on_a_gpu(num_tokens, num_experts, top_k, norm_topk_prob, log2_block_size, dtype, seed):
    """Half-precision logits of many tokens tie often."""
    top_k = min(top_k, num_experts)
    case = cases.Case(num_tokens, num_experts, top_k, norm_topk_prob, 2**log2_block_size, dtype, seed=seed)
    cases.check(case, "cuda")


@pytest.mark.gpu
def test_tile_and_chunk_sizes_that_are_used_on_a_gpu():
    from nanovllm.kernels.moe_routing import CHUNK_SIZE, TILE_SIZE

    for num_tokens in (1, 64, 2000):
        cases.check(cases.Case(num_tokens, 128, 8, tile_size=TILE_SIZE, chunk_size=CHUNK_SIZE, block_size=64), "cuda")
