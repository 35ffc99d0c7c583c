"""qk_norm_rope_store against the references of what it fuses: interpreted, compiled without a GPU, run on a GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import qk_norm_rope_store_cases as cases
from tests.support.kernels.compiling import TARGETS, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
REAL = {
    "qwen3-0.6b": cases.Case(16, 8, 128),
    "llama-3-8b": cases.Case(32, 8, 128, has_norm=False),
    "qwen2.5-0.5b": cases.Case(14, 2, 64, has_norm=False),
    "qwen3-30b-a3b": cases.Case(32, 4, 128),
}
SUPPORTED = {**REAL, "head size 256": cases.Case(16, 8, 256), "head size 80": cases.Case(8, 8, 80)}


def test_interpreted():
    """D52"""
    run_interpreted(cases.__name__)


@TARGETS
@pytest.mark.parametrize("case", SUPPORTED.values(), ids=SUPPORTED)
@pytest.mark.parametrize("num_tokens", [9, 9000])
def test_compiled(capability, dtype, case, num_tokens):
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    dim, heads = case.head_dim, case.num_kv_heads
    qkv, table = meta(num_tokens, (case.num_heads + 2 * heads) * dim), meta(num_tokens, dim // 2, dtype=torch.float32)
    weights = (meta(dim), meta(dim)) if case.has_norm else (None, None)
    store = (meta(100, 256, heads, dim), meta(100, 256, heads, dim), meta(num_tokens, dtype=torch.int64))

    def launch():
        inputs = (qkv, table, table, *weights, 1e-6, case.num_heads)
        # With the key as in prefill, where many tokens come at once; without it as in decode.
        qk_norm_rope_store(*inputs, *store, num_kv_heads=heads, returns_key=num_tokens > 9)

    for compiled in compile_launches(launch, capability):
        # ptxas may keep two values in memory so that another block fits on a multiprocessor.
        assert_fits(compiled, max_registers=128, max_shared_bytes=8192, max_stack_bytes=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.empty(3, 127)}, r"qkv must be \[T, 128\]"),
        ({"qkv": torch.empty(3, 128, dtype=torch.float64)}, r"qkv must be \[T, 128\]"),
        ({"cos": torch.empty(2, 8)}, "cos must be"),
        ({"sin": torch.empty(3, 8, dtype=torch.float16)}, "sin must be"),
        ({"q_weight": None}, "given together"),
        ({"k_weight": torch.empty(8)}, "k_weight must be"),
        ({"k_cache": torch.empty(2, 16, 4, 8)}, "k_cache must be"),
        ({"v_cache": torch.empty(2, 16, 2, 16, dtype=torch.float16)}, "v_cache must be"),
        ({"v_cache": None}, "given together"),
        ({"slot_mapping": torch.empty(2, dtype=torch.int64)}, r"slot_mapping must be \[3\]"),
    ],
)
def test_other_inputs_are_refused(change, message):
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store

    inputs = {name: torch.empty(3, 8) for name in ("cos", "sin")}
    inputs |= {name: torch.empty(16) for name in ("q_weight", "k_weight")}
    inputs |= {name: torch.empty(2, 16, 2, 16) for name in ("k_cache", "v_cache")}
    inputs |= {"qkv": torch.empty(3, 128), "slot_mapping": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_store(**inputs, eps=1e-6, num_heads=4, num_kv_heads=2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    """D52"""
    cases.CHECKS[name]("cuda")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", SUPPORTED.values(), ids=SUPPORTED)
def test_on_a_gpu_at_real_sizes(case, dtype):
    slots = tuple(slot if slot % 5 else -1 for slot in torch.randperm(48).tolist())
    cases.check_case(replace(case, dtype=dtype, slots=slots), "cuda")


@pytest.mark.gpu
@DTYPES
@settings(deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (3, 1), (14, 2), (6, 3)]),
    head_dim=st.sampled_from([2, 32, 80]),
    slots=st.lists(st.integers(0, 47), unique=True, max_size=48),
    has_norm=st.booleans(),
    returns_key=st.booleans(),
)
def test_on_a_gpu_at_drawn_shapes(dtype, heads, head_dim, slots, has_norm, returns_key):
    case = cases.Case(*heads, head_dim, tuple(slots), dtype, has_norm=has_norm, returns_key=returns_key)
    cases.check_case(case, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_repeats_itself():
    from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store

    qkv, weight = torch.randn(500, 32 * 128, device="cuda").bfloat16(), torch.randn(128, device="cuda").bfloat16()
    table, slots = torch.randn(500, 64, device="cuda"), torch.randperm(512, device="cuda")[:500]
    results = []
    for _ in range(50):
        k_cache, v_cache = (torch.zeros(2, 256, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        inputs = (qkv, table, table, weight, weight, 1e-6, 16, k_cache, v_cache, slots)
        query, _ = qk_norm_rope_store(*inputs, num_kv_heads=8)
        results.append((query, k_cache, v_cache))
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))
