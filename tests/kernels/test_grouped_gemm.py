"""grouped_gemm against reference.moe: interpreted on the CPU, compiled without a GPU, run on a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import grouped_gemm_cases as cases
from tests.support.kernels.compiling import CAPABILITIES, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TABLE = [1, 64, 512, 16_384]  # numbers of tokens, one for each entry of grouped_gemm_tiles
QWEN3_30B_A3B = {"num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}


def test_interpreted():
    run_interpreted(cases.__name__)


def launch_on_meta(num_tokens: int, dtype: torch.dtype) -> None:
    from nanovllm.kernels.grouped_gemm import grouped_gemm, grouped_gemm_tiles
    from nanovllm.kernels.moe_routing import moe_routing

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tiles = grouped_gemm_tiles(num_tokens * 8, 128, dtype.itemsize)
    routing = moe_routing(empty(num_tokens, 128), 8, True, tiles.rows)
    grouped_gemm(empty(num_tokens, 2048), empty(128, 2 * 768, 2048), empty(128, 2048, 768), routing)


@CAPABILITIES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", TABLE)
def test_compiled(capability, dtype, num_tokens):
    """Qwen3-30B-A3B: every entry of the table of tiles."""
    *_, gate_up, down = compile_launches(lambda: launch_on_meta(num_tokens, dtype), capability)
    assert_fits(gate_up)
    assert_fits(down)


def test_table_of_tiles_is_compiled_whole():
    from nanovllm.kernels.grouped_gemm import grouped_gemm_tiles

    for itemsize in (2, 4):
        compiled = {grouped_gemm_tiles(num_tokens * 8, 128, itemsize) for num_tokens in TABLE}
        assert {grouped_gemm_tiles(num_tokens * 8, 128, itemsize) for num_tokens in range(1, 20_000)} == compiled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(3, 16).double()}, "bfloat16, float16 or float32, got torch.float64"),
        ({"hidden_states": torch.zeros(4, 16)}, "hidden_states must be .* of shape .3, 16."),
        ({"gate_up_proj": torch.zeros(4, 16, 16)}, "gate_up_proj must be .* of shape .4, 32, 16."),
        ({"down_proj": torch.zeros(4, 16, 16).half()}, "down_proj must be contiguous, torch.float32"),
        ({"gate_up_proj": torch.zeros(4, 16, 32).mT}, "gate_up_proj must be contiguous"),
        ({"block_size": 32}, "block_size must be the rows of a tile, 16, got 32"),
        ({"tiles": (16, 48, 16, 4, 3)}, "powers of two from 16"),
    ],
)
def test_what_the_contract_excludes_is_refused(change, message):
    from nanovllm.kernels.grouped_gemm import Tiles, grouped_gemm
    from nanovllm.kernels.moe_routing import Routing

    arguments = {
        "hidden_states": torch.zeros(3, 16),
        "gate_up_proj": torch.zeros(4, 32, 16),
        "down_proj": torch.zeros(4, 16, 16),
        "tiles": (16, 16, 16, 4, 3),
        "block_size": 16,
        **change,
    }
    experts, block_size, tiles = (
        torch.zeros(3, 2, dtype=torch.int32),
        arguments.pop("block_size"),
        arguments.pop("tiles"),
    )
    routing = Routing(experts.float(), experts, experts[0], experts[0], experts[0], block_size)
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**arguments, routing=routing, tiles=Tiles(*tiles))


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    cases.CHECKS[name]("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 300])
def test_qwen3_30b_a3b_on_a_gpu(num_tokens, dtype):
    """The real shape, with the tiles that the table gives. D52: the experts' weights end beyond 2**27 elements."""
    cases.check(cases.Case(num_tokens, **QWEN3_30B_A3B, dtype=dtype, tiles=None), "cuda")


@pytest.mark.gpu
@given(
    num_tokens=st.integers(1, 100),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 4),
    hidden_size=st.integers(1, 130),
    intermediate_size=st.integers(1, 130),
    tiles=st.sampled_from([None, (16, 32, 32), (64, 64, 32)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_random_shapes_on_a_gpu(num_tokens, num_experts, top_k, hidden_size, intermediate_size, tiles, dtype, seed):
    top_k = min(top_k, num_experts)
    case = cases.Case(
        num_tokens, num_experts, top_k, hidden_size, intermediate_size, dtype=dtype, tiles=tiles, seed=seed
    )
    cases.check(case, "cuda")


@pytest.mark.gpu
def test_weights_beyond_2_31_elements_on_a_gpu():
    """D52: the last of 700 experts' weights begin beyond 2**31 elements; all others are NaN."""
    from nanovllm.kernels.grouped_gemm import Tiles, grouped_gemm
    from nanovllm.kernels.moe_routing import moe_routing

    num_experts, e, f = 700, 2048, 1024
    gate_up = torch.full((num_experts, 2 * f, e), torch.nan, dtype=torch.float16, device="cuda")
    down = torch.full((num_experts, e, f), torch.nan, dtype=torch.float16, device="cuda")
    gate_up[-1].normal_(std=e**-0.5), down[-1].normal_(std=f**-0.5)
    logits = torch.zeros(5, num_experts, device="cuda")
    logits[:, -1] = 1.0
    x = torch.randn(5, e, device="cuda", dtype=torch.float16)
    output = grouped_gemm(x, gate_up, down, moe_routing(logits, 1, True, 16), tiles=Tiles(16, 64, 64, 4, 3))
    alone = moe_routing(logits[:, -1:], 1, True, 16)
    assert torch.equal(output, grouped_gemm(x, gate_up[-1:], down[-1:], alone, tiles=Tiles(16, 64, 64, 4, 3)))
    assert output.isfinite().all()


@pytest.mark.gpu
def test_fifty_runs_are_bit_equal_and_a_token_does_not_see_the_others():
    """Also in another order: a token's row in its block changes nothing."""
    from nanovllm.kernels.grouped_gemm import grouped_gemm, grouped_gemm_tiles
    from nanovllm.kernels.moe_routing import moe_routing

    case = cases.Case(200, **QWEN3_30B_A3B, dtype=torch.bfloat16)
    layer = cases.make_layer(case, "cuda")
    tiles = grouped_gemm_tiles(200 * case.top_k, case.num_experts, 2)
    logits = cases.router_logits(layer)

    def run(order: torch.Tensor) -> torch.Tensor:
        routing = moe_routing(logits[order].contiguous(), case.top_k, True, tiles.rows)
        x = layer.hidden_states[order].contiguous()
        return grouped_gemm(x, layer.gate_up_proj, layer.down_proj, routing, tiles=tiles)

    in_order = torch.arange(200, device="cuda")
    expected = run(in_order)
    assert all(torch.equal(run(in_order), expected) for _ in range(50))
    shuffled = torch.randperm(200, device="cuda")
    assert torch.equal(run(shuffled), expected[shuffled])


@pytest.mark.gpu
def test_layer_recorded_in_a_graph_follows_its_input():
    """Other tokens choose other experts, and nothing waits for the device."""
    from nanovllm.layers.moe import SparseMoeBlock
    from nanovllm.model_config import MoEConfig

    with torch.device("cuda"):
        layer = SparseMoeBlock(64, MoEConfig(16, 4, 32, True, layers=frozenset({0}))).bfloat16()
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    assert layer.is_graph_safe
    x = torch.randn(12, 64, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = layer(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(recorded, layer(x))
