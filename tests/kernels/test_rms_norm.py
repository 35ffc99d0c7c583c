"""rms_norm and add_rms_norm against reference.rms_norm: interpreted, compiled without a GPU, run on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import rms_norm_cases as cases
from tests.support.kernels.compiling import TARGETS, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
NORMS = pytest.mark.parametrize("check", [cases.check_rms_norm, cases.check_add_rms_norm])
HIDDEN_SIZES = (896, 1024, 2048, 4096)  # qwen2.5-0.5b, qwen3-0.6b, qwen3-30b-a3b, llama-3-8b


def test_interpreted():
    """D50, D52"""
    run_interpreted(cases.__name__)


@TARGETS
@pytest.mark.parametrize("size", [128, *HIDDEN_SIZES])
@pytest.mark.parametrize("num_tokens", [100, 10000])
def test_compiled(capability, dtype, num_tokens, size):
    from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm

    x, weight = torch.empty(num_tokens, size, dtype=dtype, device="meta"), torch.empty(size, dtype=dtype, device="meta")
    heads = x.view(-1, 10, size)[:, 2:]

    def launch():
        rms_norm(heads, weight)
        add_rms_norm(x, x, weight)

    for compiled in compile_launches(launch, capability):
        assert_fits(compiled, max_registers=128, max_shared_bytes=1024)  # a partial sum a warp and row is shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.empty(8)}, "x must be"),
        ({"x": torch.empty(8, 4).T}, "x must be"),
        ({"x": torch.empty(4, 8, dtype=torch.float64)}, "x must be"),
        ({"weight": torch.empty(1)}, r"weight must be \[8\]"),
        ({"weight": torch.empty(8, dtype=torch.float16)}, r"weight must be \[8\]"),
        ({"residual": torch.empty(1, 8)}, r"residual must be \[4, 8\]"),
        ({"residual": torch.empty(4, 8, dtype=torch.float16)}, r"residual must be \[4, 8\]"),
    ],
)
def test_other_inputs_are_refused(change, message):
    from nanovllm.kernels.rms_norm import add_rms_norm

    inputs = {"x": torch.empty(4, 8), "residual": torch.empty(4, 8), "weight": torch.empty(8), **change}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    """D50, D52"""
    cases.CHECKS[name]("cuda")


@pytest.mark.gpu
@DTYPES
@NORMS
@pytest.mark.parametrize("num_tokens", [1, 257, 16384])
@pytest.mark.parametrize("size", HIDDEN_SIZES)
def test_on_a_gpu_at_real_sizes(size, num_tokens, check, dtype):
    check((num_tokens, size), dtype, "cuda")


@pytest.mark.gpu
@DTYPES
def test_on_a_gpu_views_of_a_packed_qkv(dtype):
    cases.check_views(dtype, "cuda")


@pytest.mark.gpu
@DTYPES
@NORMS
@settings(deadline=None)
@given(num_tokens=st.integers(1, 300), size=st.sampled_from([1, 7, 64, 96, 128, 1000, 5000]))
def test_on_a_gpu_at_drawn_shapes(check, dtype, num_tokens, size):
    check((num_tokens, size), dtype, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_repeats_itself():
    from nanovllm.kernels.rms_norm import add_rms_norm

    x, weight = torch.randn(1000, 1024, device="cuda").bfloat16(), torch.randn(1024, device="cuda").bfloat16()
    first = add_rms_norm(x, x, weight)
    for _ in range(50):
        again = add_rms_norm(x, x, weight)
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
