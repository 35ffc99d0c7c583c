"""Cases of grouped_gemm against reference.moe."""

from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st

from benchmarks.kernels.grouped_gemm import measured
from nanovllm.layers.torch_ops import apply_experts
from reference.moe import moe
from tests.support.kernels.accuracy import assert_within_the_error_of_plain_torch
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import DTYPES, Compilation, Kernel, Limits, Refused, Steps, case, each, lazy, meta

grouped_gemm, choose_tile_config = lazy("grouped_gemm.grouped_gemm"), lazy("grouped_gemm.choose_tile_config")
TileConfig, Routing = lazy("grouped_gemm.TileConfig"), lazy("moe_routing.Routing")
moe_routing = lazy("moe_routing.moe_routing")
QWEN3_30B_A3B = (128, 8, 2048, 768)  # experts, experts of a token, hidden size, intermediate size
NUM_TOKENS = (1, 64, 512, 16_384)  # one for each entry of choose_tile_config


@dataclass(frozen=True)
class Layer:
    """hidden_states [T, E], router [N, E] float32, gate_up_proj [N, 2 * F, E], down_proj [N, E, F].

    Normal numbers, scaled so that activations stay about 1.
    """

    hidden_states: torch.Tensor
    router: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    @classmethod
    def random(cls, device: str, num_tokens: int, n: int, e: int, f: int, dtype: torch.dtype, seed: int = 0) -> "Layer":
        generator = torch.Generator(device).manual_seed(seed)
        randn = partial(torch.randn, generator=generator, device=device)
        hidden_states, router = randn(num_tokens, e).to(dtype), randn(n, e).to(dtype).float()
        gate_up_proj, down_proj = randn(n, 2 * f, e) * e**-0.5, randn(n, e, f) * f**-0.5
        return cls(hidden_states, router, gate_up_proj.to(dtype), down_proj.to(dtype))

    def router_logits(self) -> torch.Tensor:
        """[T, N] float32, of float64: what moe_routing gets, so that it chooses as the reference does."""
        return (self.hidden_states.double() @ self.router.double().T).float()

    def expected(self, top_k: int, norm_topk_prob: bool) -> torch.Tensor:
        """reference.moe in float64. It multiplies all experts, so the unused ones are 0 instead of NaN."""
        tensors = (self.hidden_states, self.router, self.gate_up_proj.nan_to_num(), self.down_proj.nan_to_num())
        return moe(*(tensor.double() for tensor in tensors), top_k, norm_topk_prob)

    def plain(self, top_k: int, norm_topk_prob: bool) -> torch.Tensor:
        """The same in plain PyTorch and the layer's dtype."""
        weights, chosen = self.router_logits().softmax(dim=1).topk(top_k)
        if norm_topk_prob:
            weights = weights / weights.sum(dim=1, keepdim=True)
        weights = weights.to(self.hidden_states.dtype)
        return apply_experts(self.hidden_states, chosen, weights, self.gate_up_proj, self.down_proj)


@case
def check(
    device: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype = torch.float32,
    norm_topk_prob: bool = True,
    unused_experts: int = 0,
    tiles: tuple[int, int, int] | None = (16, 16, 16),
    seed: int = 0,
) -> None:
    """The output is reference.moe's. tiles: (rows, columns, inner). unused_experts: the last ones, of NaN weights."""
    top_k = min(top_k, num_experts)
    layer = Layer.random(device, num_tokens, num_experts, hidden_size, intermediate_size, dtype, seed)
    if unused_experts:  # their logits are low
        layer.hidden_states[:, 0], layer.router[-unused_experts:, 0] = 4.0, -1000.0
        layer.gate_up_proj[-unused_experts:], layer.down_proj[-unused_experts:] = torch.nan, torch.nan
    used = TileConfig(*tiles, 4, 3) if tiles else choose_tile_config(num_tokens * top_k, num_experts, dtype.itemsize)
    guards = Guards(device)
    arguments = [guards.read(tensor) for tensor in (layer.hidden_states, layer.gate_up_proj, layer.down_proj)]
    with guards:
        routing = moe_routing(layer.router_logits(), top_k, norm_topk_prob, used.rows)
        output = grouped_gemm(*arguments, routing, tiles=used)
    exact, plain = layer.expected(top_k, norm_topk_prob), layer.plain(top_k, norm_topk_prob)
    assert_within_the_error_of_plain_torch("grouped_gemm", output, plain, exact, ("token", "element"))


CASES = {
    "one token": check(1, 4, 2, 32, 16),
    "one expert": check(5, 1, 1, 16, 16),
    "ragged sizes": check(7, 4, 2, 20, 12),
    "several blocks an expert": check(40, 2, 2, 16, 16),
    "several tiles of columns and steps": check(5, 3, 2, 80, 48, tiles=(16, 32, 16)),
    "weights are not renormalised": check(6, 5, 2, 16, 8, norm_topk_prob=False),
    "experts that no token chose are NaN": check(6, 8, 2, 16, 8, unused_experts=4),
    "float16": check(9, 4, 2, 48, 24, dtype=torch.float16),
    "float16, ragged": check(9, 4, 2, 20, 12, dtype=torch.float16),
}


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
    num_experts, top_k, *sizes = QWEN3_30B_A3B
    layer = Layer.random(device, 200, num_experts, *sizes, torch.bfloat16)
    tiles, logits = choose_tile_config(200 * top_k, num_experts, 2), layer.router_logits()

    def run(order: torch.Tensor) -> torch.Tensor:
        routing = moe_routing(logits[order].contiguous(), top_k, True, tiles.rows)
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


KERNEL = Kernel(
    name="grouped_gemm",
    launched={"grouped_gemm_kernel": Limits()},
    cases=CASES,
    on_gpu=each(
        lambda num_tokens, dtype: check(num_tokens, *QWEN3_30B_A3B, dtype, tiles=None),
        num_tokens=(1, 8, 64, 300),
        dtype=DTYPES,
    )
    | {"far expert": check_far_expert, "order of tokens": check_order_of_tokens},
    drawn=st.builds(
        check,
        st.integers(1, 100),
        st.integers(1, 20),
        st.integers(1, 4),
        st.integers(1, 130),
        st.integers(1, 130),
        st.sampled_from(DTYPES),
        tiles=st.sampled_from([None, (16, 32, 32), (64, 64, 32)]),
        seed=st.integers(0, 2**16),
    ),
    compiled={f"{n} tokens": Compilation(lambda dtype, _, n=n: launch(n, dtype)) for n in NUM_TOKENS},
    refused=Refused(
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
    beyond_contract=frozenset({"order of tokens"}),
)
