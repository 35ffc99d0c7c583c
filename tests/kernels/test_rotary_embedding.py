"""rotary_embedding against the layer's formula, which tests/unit/layers hold against reference.rotary_embedding.

Interpreted on the CPU, compiled without a GPU, run on a GPU. Positions are none of the kernel's business: it is given
cos and sin, for which the formula in float64 is exact.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import rotary_embedding_cases as cases
from tests.support.kernels.compiling import TARGETS, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
# qwen3-0.6b, llama-3-8b, qwen2.5-0.5b, qwen3-30b-a3b
REAL_HEADS = pytest.mark.parametrize(
    ("heads", "head_dim"), [((16, 8), 128), ((32, 8), 128), ((14, 2), 64), ((32, 4), 128)]
)


def test_interpreted():
    """D52"""
    run_interpreted(cases.__name__)


@TARGETS
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((16, 8), 128), ((32, 8), 128), ((14, 2), 64), ((8, 8), 256), ((4, 2), 80)]
)
def test_compiled(capability, dtype, heads, head_dim):
    from nanovllm.kernels.rotary_embedding import rotary_embedding

    query, key = torch.empty(9, sum(heads), head_dim, dtype=dtype, device="meta").split(heads, dim=1)
    table = torch.empty(9, head_dim // 2, device="meta")
    (compiled,) = compile_launches(lambda: rotary_embedding(query, key, table, table), capability)
    assert_fits(compiled, max_registers=255, max_shared_bytes=1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.empty(3, 32)}, "query must be"),
        ({"query": torch.empty(3, 2, 16, dtype=torch.float64)}, "query must be"),
        ({"key": torch.empty(2, 16, 3).transpose(0, 2).transpose(1, 2)}, "key must be"),
        ({"key": torch.empty(3, 2, 32)}, "key must be .* as query is"),
        ({"cos": torch.empty(3, 16)}, "cos must be"),
        ({"sin": torch.empty(3, 8, dtype=torch.float16)}, "sin must be"),
    ],
)
def test_other_inputs_are_refused(change, message):
    from nanovllm.kernels.rotary_embedding import rotary_embedding

    inputs = {"query": torch.empty(3, 4, 16), "key": torch.empty(3, 2, 16)}
    inputs |= {"cos": torch.empty(3, 8), "sin": torch.empty(3, 8), **change}
    with pytest.raises(ValueError, match=message):
        rotary_embedding(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    """D52"""
    cases.CHECKS[name]("cuda")


@pytest.mark.gpu
@DTYPES
@REAL_HEADS
@pytest.mark.parametrize("num_tokens", [1, 257, 4096])
def test_on_a_gpu_at_real_sizes(num_tokens, heads, head_dim, dtype):
    cases.check_shape(num_tokens, heads, head_dim, dtype, "cuda")


@pytest.mark.gpu
@DTYPES
@settings(deadline=None)
@given(
    num_tokens=st.integers(1, 100),
    heads=st.tuples(st.sampled_from([1, 3, 14]), st.sampled_from([1, 2, 5])),
    head_dim=st.sampled_from([2, 32, 80, 256]),
)
def test_on_a_gpu_at_drawn_shapes(dtype, num_tokens, heads, head_dim):
    cases.check_shape(num_tokens, heads, head_dim, dtype, "cuda")
