"""silu_and_mul against reference.silu_and_mul: interpreted, compiled without a GPU, run on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import silu_and_mul_cases as cases
from tests.support.kernels.compiling import TARGETS, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
# qwen3-30b-a3b's experts, qwen3-0.6b, qwen2.5-0.5b, llama-3-8b
INTERMEDIATE_SIZES = pytest.mark.parametrize("size", [768, 3072, 4864, 14336])


def test_interpreted():
    """D50, D52"""
    run_interpreted(cases.__name__)


@TARGETS
@INTERMEDIATE_SIZES
def test_compiled(capability, dtype, size):
    from nanovllm.kernels.silu_and_mul import silu_and_mul

    def launch():
        for num_tokens in (1, 256, 16384):
            silu_and_mul(torch.empty(num_tokens, 2 * size, dtype=dtype, device="meta"))

    for compiled in compile_launches(launch, capability):
        assert_fits(compiled, max_registers=128, max_shared_bytes=0)  # no element meets another


@pytest.mark.parametrize(
    "x",
    [torch.empty(4), torch.empty(4, 7), torch.empty(8, 4).T, torch.empty(4, 8, dtype=torch.float64)],
    ids=["one dimension", "odd", "strided", "float64"],
)
def test_other_inputs_are_refused(x):
    from nanovllm.kernels.silu_and_mul import silu_and_mul

    with pytest.raises(ValueError, match=r"x must be \[T, 2 \* F\]"):
        silu_and_mul(x)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    """D50, D52"""
    cases.CHECKS[name]("cuda")


@pytest.mark.gpu
@DTYPES
@INTERMEDIATE_SIZES
@pytest.mark.parametrize("num_tokens", [1, 257, 4096])
def test_on_a_gpu_at_real_sizes(num_tokens, size, dtype):
    cases.check_shape(num_tokens, size, dtype, "cuda")


@pytest.mark.gpu
@DTYPES
@settings(deadline=None)
@given(num_tokens=st.integers(1, 300), size=st.integers(1, 3000), spare=st.integers(0, 9))
def test_on_a_gpu_at_drawn_shapes(dtype, num_tokens, size, spare):
    cases.check_shape(num_tokens, size, dtype, "cuda", stride=2 * size + spare)
