"""Which implementation of the layers' operations a model gets, and that the implementations agree on a GPU."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from nanovllm import kernels
from nanovllm.attention.backend import AttentionRequirements
from nanovllm.kernels import flash_attention
from nanovllm.layers.ops import LayerOps, separate_steps
from nanovllm.layers.select_ops import flash_attn_ops, select_ops
from nanovllm.layers.torch_ops import TORCH_OPS
from tests.support.attention_cases import Case, make_step
from tests.support.comparing import assert_close, same_bits
from tests.support.kernels.accuracy import assert_within_the_error_of_plain_torch
from tests.support.kernels.reaching import flash_attn_stand_in

STEPS = {
    "prefill": Case(((5, 5), (33, 33)), block_size=256),
    "prefill over cached keys": Case(((5, 21), (17, 17)), block_size=256),
    "decode": Case(((1, 1), (1, 45)), is_prefill=False, block_size=256),
}
each_step = pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which flash-attn and a GPU of compute capability 8.0 seem to be there; triton has to be."""
    pytest.importorskip("triton")
    monkeypatch.setattr(flash_attention, "import_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    # Its thread may run longer than a test.
    monkeypatch.setattr("nanovllm.kernels.launching.hash_compiler", lambda: None)


def select(attention_backend: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> LayerOps:
    return select_ops(attention_backend, AttentionRequirements(torch.device("cuda"), dtype, head_dim, 256))


@pytest.mark.parametrize(
    ("requested", "attention", "is_fused", "is_graph_safe"),
    [
        ("auto", "flash_attn", True, True),
        ("flash_attn", "flash_attn", False, True),
        ("triton", "triton", True, True),
        ("torch", "torch", True, False),
    ],
)
def test_a_gpu_gets_triton_kernels_with_the_attention_asked_for(
    ampere: None, requested: str, attention: str, is_fused: bool, is_graph_safe: bool
) -> None:
    """flash_attn by name is the classic path; "auto" combines its attention with the fused kernel."""
    from nanovllm.layers.triton_ops import TRITON_OPS

    ops = select(requested)
    assert (ops.attention.name, ops.attention.is_graph_safe) == (attention, is_graph_safe)
    assert (ops.qk_norm_rope_store is TRITON_OPS.qk_norm_rope_store) == is_fused
    assert (ops.compile_ahead is not None) == (attention == "triton"), "other backends would compute"
    differing = ("attention", "qk_norm_rope_store", "compile_ahead")
    assert dataclasses.replace(ops, **{name: getattr(TRITON_OPS, name) for name in differing}) == TRITON_OPS


@pytest.mark.parametrize(
    ("dtype", "head_dim", "is_triton"), [(torch.float64, 64, False), (torch.bfloat16, 80, True)], ids=str
)
def test_auto_on_a_gpu_takes_torch_where_no_kernel_fits(ampere, dtype, head_dim, is_triton) -> None:
    """float64: for everything. An unusual head_dim: for attention, and no CUDA graphs."""
    ops = select("auto", dtype, head_dim)
    assert (ops.attention.name, ops is TORCH_OPS) == ("torch", not is_triton)
    assert not ops.attention.is_graph_safe


def test_without_triton_all_is_torch(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """D55"""
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert select("auto") is TORCH_OPS


@each_step
def test_flash_attn_is_called_as_it_documents(case: Case) -> None:
    """A stand-in on the CPU, which reference/ computes."""
    step, expected = make_step(case), make_step(case)
    with flash_attn_stand_in():
        output = step.run(flash_attn_ops(TORCH_OPS, is_fused=False))
    assert_close("attention: flash_attn's stand-in", output, expected.run(), rtol=0, atol=1e-11)
    assert same_bits(step.k_cache, expected.k_cache)


# --- the implementations ---


def rotate(ops: LayerOps, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = (x.to(torch.promote_types(heads.dtype, torch.float32)) for x in (cos, sin))
    return torch.cat(ops.rotary_embedding(*heads.split([4, 2], dim=1), cos, sin), dim=1)


OPERATIONS: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {  # and the shapes of its inputs
    "rms_norm": (lambda ops, x, weight: ops.rms_norm(x, weight, 1e-6), [(9, 6, 96), (96,)]),
    "add_rms_norm": (lambda ops, *tensors: ops.add_rms_norm(*tensors, 1e-6)[0], [(50, 96), (50, 96), (96,)]),
    "linear": (lambda ops, *tensors: ops.linear(*tensors), [(5, 96), (64, 96), (64,)]),
    "norm_linear": (
        lambda ops, x, residual, norm_weight, *others: ops.norm_linear(x, residual, norm_weight, 1e-6, *others)[0],
        [(5, 96), (5, 96), (96,), (64, 96), (64,)],
    ),
    "norm_linear, gated": (
        lambda ops, x, norm_weight, weight: ops.norm_linear(x, None, norm_weight, 1e-6, weight, None, is_gated=True)[0],
        [(5, 96), (96,), (64, 96)],
    ),
    "rotary_embedding": (rotate, [(9, 6, 96), (9, 48), (9, 48)]),
}


@pytest.mark.parametrize("dtype", [torch.float64, *kernels.DTYPES], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_leaves_its_inputs_as_they_were(name: str, dtype: torch.dtype) -> None:
    """D50"""
    operation, shapes = OPERATIONS[name]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    before = [x.clone() for x in inputs]
    operation(TORCH_OPS, *inputs)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_triton_and_torch_agree(name: str, dtype: torch.dtype) -> None:
    from nanovllm.layers.triton_ops import TRITON_OPS

    operation, shapes = OPERATIONS[name]
    inputs = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    exact = operation(TORCH_OPS, *(x.double() for x in inputs))
    plain = operation(TORCH_OPS, *inputs)
    kernel = name.removeprefix("add_")
    assert_within_the_error_of_plain_torch(kernel, operation(TRITON_OPS, *inputs), plain, exact)


@pytest.mark.gpu
@each_step
def test_fused_and_separate_steps_agree(case: Case) -> None:
    """In float32 all round alike but for the order of a sum: 1e-5 is 80 units in the last place of 1."""
    from nanovllm.layers.triton_ops import TRITON_OPS

    fused = dataclasses.replace(TRITON_OPS, attention=TORCH_OPS.attention)
    steps = separate_steps(fused.rms_norm, fused.rotary_embedding, fused.store_kvcache)
    results = []
    for ops in (TORCH_OPS, fused, dataclasses.replace(fused, qk_norm_rope_store=steps)):
        step = make_step(case, torch.float32, "cuda")
        results.append((step.run(ops), step.k_cache, step.v_cache))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
