"""Attention, the layer: norms and rotation come before the store, and warm-up has no cache."""

import pytest
import torch

from nanovllm.context import set_context
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from reference.packing import varlen_attention
from reference.rms_norm import rms_norm
from reference.rotary_embedding import rotary_embedding
from tests.support.attention_cases import Case, assert_same_bits, make_step
from tests.support.comparing import assert_close

PREFILL, DECODE = Case(((8, 8), (3, 3))), Case(((1, 9), (1, 1)), is_prefill=False)
ATTENTION = "layers: attention with norms and rotation against the reference, float64"


@pytest.mark.parametrize("has_norms", [True, False])
def test_heads_are_normalised_and_rotated_and_then_stored(has_norms: bool) -> None:
    """Values are neither."""
    step, case = make_step(PREFILL), PREFILL
    norms = (RMSNorm(case.head_dim, 1e-5).double(), RMSNorm(case.head_dim, 1e-5).double())
    for norm in norms:
        norm.weight.copy_(1 + 0.3 * torch.randn(case.head_dim))
    positions = torch.cat([torch.arange(q_len) for q_len, _ in case.lengths])
    angle = positions[:, None] * 10000.0 ** (-torch.arange(0, case.head_dim, 2).double() / case.head_dim)
    layer = Attention(case.num_heads, case.head_dim, case.scale, case.num_kv_heads)
    layer.bind_kv_cache(step.k_cache, step.v_cache)
    with set_context(step.context), torch.inference_mode():
        output = layer(step.qkv.flatten(1), angle.cos(), angle.sin(), norms if has_norms else None)

    query, key, value = step.heads
    if has_norms:
        query, key = (rms_norm(x, norm.weight, 1e-5) for x, norm in zip((query, key), norms, strict=True))
    query, key = rotary_embedding(positions, query, 10000.0), rotary_embedding(positions, key, 10000.0)
    cu_seqlens, slots = step.context.cu_seqlens_q, step.context.slot_mapping
    expected = varlen_attention(query, key, value, cu_seqlens, cu_seqlens, case.scale)
    assert_close(ATTENTION, output, expected, rtol=0, atol=1e-11)
    assert_close(ATTENTION, step.k_cache.flatten(0, 1)[slots], key, rtol=0, atol=1e-11)
    assert_same_bits(step.v_cache.flatten(0, 1)[slots], value)


def test_without_a_cache_prefill_attends_over_the_step_and_stores_nothing() -> None:
    """Warm-up runs before there is a cache."""
    step = make_step(PREFILL)
    assert_same_bits(step.run(has_cache=False), make_step(PREFILL).run())


@pytest.mark.parametrize("case", [DECODE, Case(((3, 8),))], ids=["decode", "prefill"])
def test_without_a_cache_cached_keys_are_an_error(case: Case) -> None:
    with pytest.raises(RuntimeError, match="bind_kv_cache"):
        make_step(case).run(has_cache=False)


def test_outside_a_forward_pass_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="set_context"):
        Attention(4, 16, 0.25, 2)(torch.zeros(1, 128), torch.zeros(1, 8), torch.zeros(1, 8))
