"""varlen_attention_hopper against the references on a Hopper GPU, and compiled without one. Not interpreted: Gluon."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")  # before the tests below are imported, which skip themselves without it

from tests.kernels import varlen_attention_cases as cases
from tests.kernels.test_varlen_attention import MIXED, meta_inputs
from tests.kernels.varlen_attention_cases import Case, Inputs
from tests.support.kernels.compiling import assert_fits, compile_launches
from tests.support.kernels.guards import Guards

KERNEL = "varlen_attention_hopper"  # in the evidence
HALF_DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 128])
BLOCK_SIZES = pytest.mark.parametrize("block_size", [0, 16, 64, 128, 256])


def run(case: Case, inputs: Inputs) -> torch.Tensor:
    from nanovllm.kernels.varlen_attention_hopper import takes, varlen_attention_hopper

    assert takes(inputs.query, inputs.key, inputs.value)
    return varlen_attention_hopper(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        case.head_dim**-0.5,
        max_seqlen_q=case.max_seqlen_q,
        block_tables=inputs.block_tables,
    )


@pytest.mark.parametrize(("group_size", "block_size"), [(1, 256), (4, 256), (7, 256), (2, 0), (7, 0), (2, 16), (2, 64)])
@HEAD_DIMS
@HALF_DTYPES
def test_compiled(dtype, head_dim, group_size, block_size):
    from nanovllm.kernels.varlen_attention_hopper import varlen_attention_hopper

    inputs = meta_inputs(dtype, head_dim, block_size, num_heads=2 * group_size)
    (compiled,) = compile_launches(lambda: varlen_attention_hopper(**inputs, scale=0.1))
    assert_fits(compiled, max_registers=168)
    assert "wgmma.mma_async" in compiled.ptx
    assert "cp.async.bulk.tensor" in compiled.ptx


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        (lambda key: key, True),
        (lambda key: key[3:], True),
        (lambda key: key.float(), False),
        (lambda key: key[..., ::2, :], False),  # heads apart
        (lambda key: key[:, :8], False),  # blocks further apart than their slots say
        (lambda key: key[:, :, :, :32], False),  # head size
        (lambda key: key[:0], False),
    ],
)
def test_what_it_takes(change, is_taken):
    from nanovllm.kernels.varlen_attention_hopper import takes

    key = change(torch.empty(8, 16, 4, 64, dtype=torch.float16))
    query = torch.empty(5, 8, key.shape[-1], dtype=key.dtype)
    assert takes(query, key, key) == is_taken


def test_it_takes_views_of_a_packed_qkv_at_multiples_of_16_bytes():
    from nanovllm.kernels.varlen_attention_hopper import takes

    query, key, value = torch.empty(5, 8, 64, dtype=torch.float16).split([4, 2, 2], dim=1)
    assert takes(query, key, value)
    odd = torch.empty(5 * 8 * 64 + 1, dtype=torch.float16)[1:].view(5, 8, 64)
    assert not takes(query, odd[:, :2], value)


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def assert_right(case: Case) -> None:
    guards = Guards("cuda")
    inputs = cases.make_inputs(case, "cuda").on_guards(guards)
    with guards:
        output = run(case, inputs)
    guards.assert_intact()
    cases.assert_right(inputs, output, KERNEL)


@pytest.mark.gpu
@BLOCK_SIZES
@HEAD_DIMS
@HALF_DTYPES
def test_right_on_a_gpu(hopper, dtype, head_dim, block_size):
    """D53"""
    assert_right(Case(MIXED, block_size, 14, 2, head_dim, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 8, 16, 64])
def test_groups_on_a_gpu(hopper, group_size):
    """D53"""
    assert_right(Case(((129, 200), (3, 3), (64, 64)), 256, 2 * group_size, 2, 128, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("last", [1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513])
@pytest.mark.parametrize("num_queries", [1, 64, 65])
def test_edges_of_tiles_on_a_gpu(hopper, num_queries, last):
    """D53: sequences that end at, before and behind the edge of a tile, of a block, of a copy."""
    k_len = max(last, num_queries)
    assert_right(Case(((num_queries, k_len), (1, 1), (num_queries, k_len)), 256, 4, 2, 128, torch.bfloat16))


@pytest.mark.gpu
@given(
    lengths=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), min_size=1, max_size=8).map(
        lambda pairs: tuple((queries, queries + cached + 1) for queries, cached in pairs)
    ),
    num_kv_heads=st.integers(1, 5),
    group_size=st.sampled_from([1, 2, 7]),
    head_dim=st.sampled_from([64, 128]),
    block_size=st.sampled_from([0, 16, 256]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shape_on_a_gpu(lengths, num_kv_heads, group_size, head_dim, block_size):
    """D53"""
    if max(q_len for q_len, _ in lengths) == 0:
        lengths = (*lengths, (1, 1))
    num_heads = num_kv_heads * group_size
    if torch.cuda.get_device_capability() == (9, 0):
        assert_right(Case(lengths, block_size, num_heads, num_kv_heads, head_dim, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [0, 16, 256])
def test_same_bits_every_time(hopper, block_size):
    """Also that no barrier is missed: a race would show as a change of bits."""
    case = Case(((900, 1500), (17, 17), (2000, 2000)), block_size, 16, 8, 128, torch.bfloat16)
    inputs = cases.make_inputs(case, "cuda")
    first = run(case, inputs)
    for _ in range(50):
        assert torch.equal(run(case, inputs), first)


@pytest.mark.gpu
def test_far_block_on_a_gpu(hopper):
    """D52: a block whose elements lie beyond 2**31."""
    case = Case(((7, 40),), 16, 2, 1, 64, torch.float16)
    near = cases.make_inputs(case, "cuda")
    assert near.block_tables is not None
    num_blocks = 2**31 // near.key[0].numel() + 8
    far = torch.empty(num_blocks, *near.key.shape[1:], dtype=case.dtype, device="cuda")
    first = num_blocks - len(near.key)
    far[first:] = near.key
    output = run(case, replace(near, key=far, value=far, block_tables=near.block_tables + first))
    cases.assert_right(replace(near, value=near.key), output, KERNEL)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize(("k_len", "is_taken"), [(511, False), (512, True)])
def test_long_prompts_come_here(hopper, monkeypatch, k_len, is_taken):
    """varlen_attention calls it, of itself, where it is faster."""
    from nanovllm.kernels import varlen_attention_hopper

    calls = []
    launch = varlen_attention_hopper.varlen_attention_hopper
    monkeypatch.setattr(
        varlen_attention_hopper,
        "varlen_attention_hopper",
        lambda *args, **kwargs: calls.append(1) or launch(*args, **kwargs),
    )
    case = Case(((k_len, k_len),), 0, 4, 2, 128, torch.bfloat16, tiles=None)
    inputs = cases.make_inputs(case, "cuda")
    cases.assert_right(inputs, cases.run(case, inputs))
    assert bool(calls) == is_taken
