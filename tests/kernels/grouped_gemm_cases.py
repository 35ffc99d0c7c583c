"""Cases of grouped_gemm against reference.moe."""

from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.arithmetic import Work
from benchmarks.kernels.inputs import randn
from benchmarks.measuring import Measured
from benchmarks.shapes import Shape
from nanovllm.layers.torch_ops import apply_experts
from reference.moe import moe
from tests.support.kernels.accuracy import assert_within_twice_the_error_of_plain_torch
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import EVERY_TARGET, Compilation, Kernel, Limits, Refusals, Steps, lazy, meta

grouped_gemm, choose_tile_config = lazy("grouped_gemm.grouped_gemm"), lazy("grouped_gemm.choose_tile_config")
TileConfig, Routing = lazy("grouped_gemm.TileConfig"), lazy("moe_routing.Routing")
moe_routing = lazy("moe_routing.moe_routing")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QWEN3_30B_A3B = {"num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}
NUM_TOKENS = (1, 64, 512, 16_384)  # one for each entry of choose_tile_config


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
    weights, chosen = router_logits(layer).softmax(dim=1).topk(case.top_k)
    if case.norm_topk_prob:
        weights = weights / weights.sum(dim=1, keepdim=True)
    weights = weights.to(case.dtype)
    return apply_experts(layer.hidden_states, chosen, weights, layer.gate_up_proj, layer.down_proj)


def check(case: Case, device: str) -> None:
    """Raise AssertionError unless the output is reference.moe's, and nothing else is written."""
    layer = make_layer(case, device)
    num_assignments = case.num_tokens * case.top_k
    if case.tiles is None:
        tiles = choose_tile_config(num_assignments, case.num_experts, layer.hidden_states.element_size())
    else:
        tiles = TileConfig(*case.tiles, num_warps=4, num_stages=3)
    guards = Guards(device)
    arguments = [guards.read(tensor) for tensor in (layer.hidden_states, layer.gate_up_proj, layer.down_proj)]
    with guards:
        routing = moe_routing(router_logits(layer), case.top_k, case.norm_topk_prob, tiles.rows)
        output = grouped_gemm(*arguments, routing, tiles=tiles)
    guards.assert_intact()
    exact, plain = expected_output(case, layer), plain_output(case, layer)
    assert_within_twice_the_error_of_plain_torch("grouped_gemm", output, plain, exact, ("token", "element"))


def check_far_expert(device: str) -> None:
    """D52: the last of 700 experts' weights begin beyond 2**31 elements; all others are NaN."""
    num_experts, e, f = 700, 2048, 1024
    gate_up = torch.full((num_experts, 2 * f, e), torch.nan, dtype=torch.float16, device=device)
    down = torch.full((num_experts, e, f), torch.nan, dtype=torch.float16, device=device)
    gate_up[-1].normal_(std=e**-0.5), down[-1].normal_(std=f**-0.5)
    logits = torch.zeros(5, num_experts, device=device)
    logits[:, -1] = 1.0
    x = torch.randn(5, e, device=device, dtype=torch.float16)
    tiles = TileConfig(16, 64, 64, 4, 3)
    output = grouped_gemm(x, gate_up, down, moe_routing(logits, 1, True, 16), tiles=tiles)
    alone = moe_routing(logits[:, -1:], 1, True, 16)
    assert torch.equal(output, grouped_gemm(x, gate_up[-1:], down[-1:], alone, tiles=tiles))
    assert output.isfinite().all()


def check_order_of_tokens(device: str) -> None:
    """A token's row in its block, and the other tokens, change no bit of its output."""
    case = Case(200, **QWEN3_30B_A3B, dtype=torch.bfloat16)
    layer = make_layer(case, device)
    tiles, logits = choose_tile_config(200 * case.top_k, case.num_experts, 2), router_logits(layer)

    def run(order: torch.Tensor) -> torch.Tensor:
        routing = moe_routing(logits[order].contiguous(), case.top_k, True, tiles.rows)
        x = layer.hidden_states[order].contiguous()
        return grouped_gemm(x, layer.gate_up_proj, layer.down_proj, routing, tiles=tiles)

    shuffled = torch.randperm(200, device=device)
    assert torch.equal(run(shuffled), run(torch.arange(200, device=device))[shuffled])


def launch(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """As SparseMoeBlock has it, with Qwen3-30B-A3B's experts, on meta tensors."""
    tiles = choose_tile_config(num_tokens * 8, 128, dtype.itemsize)
    routing = moe_routing(meta(num_tokens, 128, dtype=dtype), 8, True, tiles.rows)
    weights = meta(128, 2 * 768, 2048, dtype=dtype), meta(128, 2048, 768, dtype=dtype)
    grouped_gemm(meta(num_tokens, 2048, dtype=dtype), *weights, routing, tiles=tiles)


def launch_refused(tiles: tuple[int, ...], block_size: int, **arguments: torch.Tensor) -> None:
    experts = torch.zeros(3, 2, dtype=torch.int32)
    routing = Routing(experts.float(), experts, experts[0], experts[0], experts[0], block_size)
    grouped_gemm(**arguments, routing=routing, tiles=TileConfig(*tiles))


def measured(shape: Shape, num_tokens: int) -> Measured:
    num_experts, top_k, size, inner = shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size

    def make(index: int) -> tuple:
        x, logits = randn(index, num_tokens, size), randn(index + 1, num_tokens, num_experts)
        gate_up, down = randn(index, num_experts, 2 * inner, size) * 0.02, randn(index, num_experts, size, inner) * 0.02
        block_size = choose_tile_config(num_tokens * top_k, num_experts, 2).rows
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
        """Every expert on every token: what plain PyTorch can do without asking the host which experts were chosen."""
        gate, up = torch.matmul(x, gate_up.transpose(1, 2)).chunk(2, dim=2)
        products = torch.bmm(functional.silu(gate) * up, down.transpose(1, 2))
        weights = torch.zeros(num_tokens, num_experts, device="cuda").scatter_(
            1, routing.experts.long(), routing.weights
        )
        return torch.einsum("nte,tn->te", products, weights.to(products.dtype))

    *_, routing = make(0)
    num_experts_hit = len(routing.experts.unique())
    # two roundings to bfloat16 before the sum over experts, and plain PyTorch rounds a third time
    work, peers = work_of_experts(num_tokens, num_experts_hit, top_k, size, inner), {"torch": plain}
    return Measured(make=make, run=grouped_gemm, expected=expected, work=work, peers=peers, tolerance=2e-2)


def work_of_experts(num_tokens: int, num_experts_hit: int, top_k: int, size: int, inner: int) -> Work:
    """6 T top_k E F operations; the three matrices of every expert that a token chose, tokens in, tokens out."""
    num_bytes = num_tokens * size * 2
    return Work(num_experts_hit * 3 * size * inner * 2 + num_bytes, num_bytes, 6 * num_tokens * top_k * size * inner)


KERNEL = Kernel(
    name="grouped_gemm",
    launched={"grouped_gemm_kernel": Limits()},
    cases={name: partial(check, case) for name, case in CASES.items()},
    on_gpu={
        f"qwen3-30b-a3b, {n} tokens, {str(dtype)[6:]}": partial(
            check, Case(n, **QWEN3_30B_A3B, dtype=dtype, tiles=None)
        )
        for n in (1, 8, 64, 300)
        for dtype in DTYPES
    }
    | {"far expert": check_far_expert, "order of tokens": check_order_of_tokens},
    drawn=st.builds(
        lambda num_tokens, num_experts, top_k, size, inner, dtype, tiles, seed: partial(
            check,
            Case(num_tokens, num_experts, min(top_k, num_experts), size, inner, dtype, tiles=tiles, seed=seed),
        ),
        st.integers(1, 100),
        st.integers(1, 20),
        st.integers(1, 4),
        st.integers(1, 130),
        st.integers(1, 130),
        st.sampled_from(DTYPES),
        st.sampled_from([None, (16, 32, 32), (64, 64, 32)]),
        st.integers(0, 2**16),
    ),
    compiled={
        f"qwen3-30b-a3b, {n} tokens": Compilation(lambda dtype, _, n=n: launch(n, dtype), EVERY_TARGET)
        for n in NUM_TOKENS
    },
    refused=Refusals(
        launch_refused,
        lambda: {
            "hidden_states": torch.zeros(3, 16),
            "gate_up_proj": torch.zeros(4, 32, 16),
            "down_proj": torch.zeros(4, 16, 16),
            "tiles": (16, 16, 16, 4, 3),
            "block_size": 16,
        },
        (
            ({"hidden_states": torch.zeros(3, 16).double()}, "bfloat16, float16 or float32, got torch.float64"),
            ({"hidden_states": torch.zeros(4, 16)}, "hidden_states must be .* of shape .3, 16."),
            ({"gate_up_proj": torch.zeros(4, 16, 16)}, "gate_up_proj must be .* of shape .4, 32, 16."),
            ({"down_proj": torch.zeros(4, 16, 16).half()}, "down_proj must be contiguous, torch.float32"),
            ({"gate_up_proj": torch.zeros(4, 16, 32).mT}, "gate_up_proj must be contiguous"),
            ({"block_size": 32}, "block_size must be the rows of a tile, 16, got 32"),
            ({"tiles": (16, 48, 16, 4, 3)}, "powers of two from 16"),
        ),
    ),
    steps={"": Steps(launch, None, met_at_start=True)},
    measured={"grouped_gemm": measured},
    reached_by="qwen3_moe",
)
