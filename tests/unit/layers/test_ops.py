"""Which tensors go to a kernel, and that the layers compute the same with it and without."""

from types import SimpleNamespace

import pytest
import torch

from nanovllm.attention.torch import TorchAttentionBackend
from nanovllm.context import set_context
from nanovllm.layers import kernel_choice
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention
from nanovllm.layers.kernel_choice import has_kernels
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import apply_rotary_embedding, rotate_query_and_key
from tests.support.attention_cases import Case, assert_same_bits, make_step
from tests.support.kernels.accuracy import assert_within_twice_the_error_of_plain_torch

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture
def has_triton(monkeypatch):
    """Call it to say whether triton can be found."""
    return lambda is_found: monkeypatch.setattr(kernel_choice, "_has_triton", lambda: is_found)


@pytest.mark.parametrize("is_found", [True, False])
@DTYPES
def test_a_tensor_on_a_gpu_has_kernels_if_there_is_triton(has_triton, dtype, is_found):
    """D55"""
    has_triton(is_found)
    assert has_kernels(SimpleNamespace(is_cuda=True, dtype=dtype)) == is_found


def test_float64_has_none(has_triton):
    has_triton(True)
    assert not has_kernels(SimpleNamespace(is_cuda=True, dtype=torch.float64))


def test_a_tensor_on_the_cpu_has_none(has_triton):
    """D55"""
    has_triton(True)
    assert not has_kernels(torch.empty(1))


@pytest.mark.gpu
@DTYPES
def test_norm(has_triton, dtype):
    norm = RMSNorm(96).to("cuda", dtype)
    norm.weight.copy_(1 + 0.3 * torch.randn(96))
    x, residual = (torch.randn(50, 96, device="cuda").to(dtype) for _ in range(2))
    normed, (normed_sum, total) = norm(x), norm(x, residual)
    has_triton(False)
    assert torch.equal(total, norm(x, residual)[1])
    plain, plain_sum = norm(x), norm(total)
    norm.double()
    assert_within_twice_the_error_of_plain_torch("rms_norm", normed, plain, norm(x.double()))
    assert_within_twice_the_error_of_plain_torch("rms_norm", normed_sum, plain_sum, norm(total.double()))


@pytest.mark.gpu
@DTYPES
def test_activation(has_triton, dtype):
    x = torch.randn(50, 192, device="cuda").to(dtype)
    actual = SiluAndMul()(x)
    has_triton(False)
    assert_within_twice_the_error_of_plain_torch("silu_and_mul", actual, SiluAndMul()(x), SiluAndMul()(x.double()))


@pytest.mark.gpu
@DTYPES
def test_rotation(dtype):
    query, key = torch.randn(9, 6, 32, device="cuda").to(dtype).split([4, 2], dim=1)
    angle = torch.randn(9, 16, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    for x, actual in zip((query, key), rotate_query_and_key(query, key, cos, sin), strict=True):
        exact = apply_rotary_embedding(x.double(), cos.double(), sin.double())
        assert_within_twice_the_error_of_plain_torch(
            "rotary_embedding", actual, apply_rotary_embedding(x, cos, sin), exact
        )


@pytest.mark.gpu
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(
    ("case", "has_cache"),
    [
        (Case(((5, 5), (33, 33))), False),
        (Case(((5, 5), (33, 33))), True),
        (Case(((5, 21), (17, 17))), True),
        (Case(((1, 1), (1, 45)), is_prefill=False), True),
    ],
    ids=["warm-up", "prefill", "prefill over cached keys", "decode"],
)
def test_packed_attention_equals_its_steps(case, has_cache, has_norms):
    """In float32 both ways round alike but for the order of a sum: 1e-5 is 80 units in the last place of 1."""
    step = make_step(case, torch.float32, "cuda")
    norms = (RMSNorm(case.head_dim).cuda(), RMSNorm(case.head_dim).cuda())
    for norm in norms:
        norm.weight.copy_(1 + 0.3 * torch.randn(case.head_dim))
    angle = torch.randn(len(step.query), case.head_dim // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    query, key = (norm(x) if has_norms else x for norm, x in zip(norms, (step.query, step.key), strict=True))
    query, key = rotate_query_and_key(query, key, cos, sin)
    qkv = torch.cat([step.query, step.key, step.value], dim=1).flatten(1)
    results = []
    for is_packed in (True, False):
        layer = Attention(case.num_heads, case.head_dim, case.scale, case.num_kv_heads, TorchAttentionBackend())
        caches = (step.k_cache.clone(), step.v_cache.clone())
        if has_cache:
            layer.bind_kv_cache(*caches)
        with set_context(step.context), torch.inference_mode():
            output = layer.forward_packed(qkv, cos, sin, norms if has_norms else None) if is_packed else None
            results.append((layer(query, key, step.value) if output is None else output, *caches))
    (output, k_cache, v_cache), expected = results
    torch.testing.assert_close(output, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k_cache, expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert_same_bits(v_cache, expected[2])
