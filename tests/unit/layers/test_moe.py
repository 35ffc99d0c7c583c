"""SparseMoeBlock against reference.moe, in float64: 1e-12 is far above its rounding and far below a wrong expert."""

import pytest
import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.moe import SparseMoeBlock
from nanovllm.layers.torch_ops import choose_experts
from nanovllm.model_config import MoEConfig
from reference.moe import moe
from tests.support.comparing import assert_close
from tests.support.parallel_ranks import partial_ranks

T, E, F, N = 9, 8, 12, 6
MOE = "layers: mixture of experts against the reference"


def weights():
    return torch.randn(N, E).double(), torch.randn(N, 2 * F, E).double(), torch.randn(N, E, F).double()


def block(router, gate_up, down, top_k, norm_topk_prob, tp):
    config = MoEConfig(N, top_k, F, norm_topk_prob, layers=frozenset({0}))
    layer = SparseMoeBlock(E, config, tp=tp).double()
    layer.gate.weight.weight_loader(layer.gate.weight, router)
    packed, downs = layer.experts.gate_up_proj.weight, layer.experts.down_proj.weight
    for expert in range(N):
        for half, matrix in enumerate(gate_up[expert].chunk(2)):
            packed.weight_loader(packed, matrix, (expert, half))
        downs.weight_loader(downs, down[expert], (expert,))
    return layer


def output(layer, x):
    """Without the norm before it, and without the residual stream."""
    return layer(x, x, lambda hidden_states, residual: (hidden_states, residual))[0]


@pytest.mark.parametrize("top_k", [1, 3, N])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sum_over_ranks_equals_the_reference(top_k, norm_topk_prob, size):
    x, (router, gate_up, down) = torch.randn(T, E).double(), weights()
    before = x.clone()
    outputs = [output(block(router, gate_up, down, top_k, norm_topk_prob, rank), x) for rank in partial_ranks(size)]
    assert torch.equal(x, before)
    expected = moe(x, router, gate_up, down, top_k, norm_topk_prob)
    assert_close(MOE, torch.stack(outputs).sum(0), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_experts_that_no_token_chose_are_not_computed():
    router, gate_up, down = weights()
    router = torch.zeros(N, E).double()
    router[0] = 1.0
    x = torch.rand(T, E).double()  # so expert 0 has the only positive logit
    expected = moe(x, router, gate_up, down, 1, True)
    gate_up[1:], down[1:] = torch.nan, torch.nan
    actual = output(block(router, gate_up, down, 1, True, TensorParallel()), x)
    assert_close(MOE, actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_routing_weights_are_normalised_in_float32_in_a_bfloat16_model():
    logits = torch.randn(50, N).bfloat16()
    weights, _ = choose_experts(logits, 2, norm_topk_prob=True)
    top = logits.softmax(-1, dtype=torch.float32).topk(2).values
    top_rounded_early = logits.softmax(-1).topk(2).values
    assert torch.equal(weights, (top / top.sum(-1, keepdim=True)).bfloat16())
    assert not torch.equal(weights, top_rounded_early / top_rounded_early.sum(-1, keepdim=True))
