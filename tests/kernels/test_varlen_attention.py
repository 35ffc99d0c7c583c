"""varlen_attention against the references: interpreted on the CPU, compiled without a GPU, run on a GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import varlen_attention_cases as cases
from tests.kernels.varlen_attention_cases import Case
from tests.support.kernels.compiling import CAPABILITIES, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

FLOAT_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
BLOCK_SIZES = pytest.mark.parametrize("block_size", [0, 16, 256], ids=["packed", "blocks of 16", "blocks of 256"])
REAL_HEADS = pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(16, 8, 128), (32, 8, 128), (14, 2, 64), (32, 4, 128)],
    ids=["Qwen3-0.6B", "Llama-3-8B", "Qwen2.5-0.5B", "Qwen3-30B-A3B"],
)


def test_interpreted():
    """D52, D53"""
    run_interpreted(cases.__name__)


def meta_inputs(
    dtype=torch.float16, head_dim=32, block_size=16, num_heads=4, num_kv_heads=2
) -> dict[str, torch.Tensor | int]:
    """Inputs of 2 sequences that have shapes and no contents; block_size 0: packed."""
    qkv = torch.empty(300, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device="meta")
    query, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    inputs = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    inputs |= {"max_seqlen_q": 200}
    if block_size:
        inputs["key"], inputs["value"] = torch.empty(
            2, 100, block_size, num_kv_heads, head_dim, dtype=dtype, device="meta"
        )
        inputs["block_tables"] = torch.empty(2, 4096 // block_size, dtype=torch.int32, device="meta")
    return inputs


def assert_compiles(capability: int, group_size: int = 2, **shape) -> None:
    from nanovllm.kernels.varlen_attention import choose_tiles, varlen_attention

    inputs = meta_inputs(num_heads=2 * group_size, **shape)
    tiles = choose_tiles(shape["dtype"], shape["head_dim"], (capability // 10, 0))
    for compiled in compile_launches(lambda: varlen_attention(**inputs, tiles=tiles), capability):
        assert_fits(compiled)


@BLOCK_SIZES
@HEAD_DIMS
@FLOAT_DTYPES
def test_compiled_for_every_head_size(dtype, head_dim, block_size):
    assert_compiles(90, dtype=dtype, head_dim=head_dim, block_size=block_size)


@CAPABILITIES
@HEAD_DIMS
@pytest.mark.parametrize("group_size", [1, 7])
def test_compiled_for_every_gpu(capability, head_dim, group_size):
    assert_compiles(capability, group_size, dtype=torch.bfloat16, head_dim=head_dim, block_size=256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": (300, 4, 96), "key": (9, 16, 2, 96), "value": (9, 16, 2, 96)}, "head_dim must be one of"),
        ({"key": (9, 16, 2, 64), "value": (9, 16, 2, 64)}, "head_dim must be one of"),
        ({"value": (9, 16, 1, 32)}, "value must have the shape of key"),
        ({"key": (9, 8, 2, 32), "value": (9, 8, 2, 32)}, "block_size must be a power of two from 16"),
        ({"key": (9, 48, 2, 32), "value": (9, 48, 2, 32)}, "block_size must be a power of two from 16"),
        ({"key": (300, 2, 32), "value": (300, 2, 32)}, "key must have 3 dimensions, 4 with block_tables"),
        ({"query": (300, 5, 32)}, "must be a multiple of key's"),
        ({"block_tables": (3, 8)}, "block_tables must have a row a sequence"),
        ({"cu_seqlens_k": (4,)}, "cu_seqlens_q and cu_seqlens_k must be"),
    ],
)
def test_other_shapes_are_refused(changes, message):
    from nanovllm.kernels.varlen_attention import varlen_attention

    inputs = meta_inputs()
    for name, shape in changes.items():
        is_integer = name in ("block_tables", "cu_seqlens_k")
        inputs[name] = torch.empty(shape, dtype=torch.int32 if is_integer else torch.float16, device="meta")
    with pytest.raises(ValueError, match=message):
        varlen_attention(**inputs)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_dtypes_that_differ_are_refused(name):
    from nanovllm.kernels.varlen_attention import varlen_attention

    inputs = meta_inputs()
    with pytest.raises(ValueError, match="must have one dtype"):
        varlen_attention(**{**inputs, name: inputs[name].float()})


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "block_tables"])
def test_int64_tables_are_refused(name):
    from nanovllm.kernels.varlen_attention import varlen_attention

    inputs = meta_inputs()
    with pytest.raises(ValueError, match="must be int32"):
        varlen_attention(**{**inputs, name: inputs[name].long()})


@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_strided_last_dimensions_are_refused(name, block_size):
    from nanovllm.kernels.varlen_attention import varlen_attention

    inputs = meta_inputs(block_size=block_size)
    strided = torch.empty((*inputs[name].shape, 2), dtype=inputs[name].dtype, device="meta")[..., 0]
    with pytest.raises(ValueError, match="last dimensions must be contiguous"):
        varlen_attention(**{**inputs, name: strided})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_that_are_not_positive_are_refused(scale):
    from nanovllm.kernels.varlen_attention import varlen_attention

    with pytest.raises(ValueError, match="scale must be above 0"):
        varlen_attention(**meta_inputs(), scale=scale)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    """D52, D53"""
    cases.CHECKS[name]("cuda")
    torch.cuda.empty_cache()


def assert_right_on_a_gpu(case: Case) -> None:
    inputs = cases.make_inputs(case, "cuda")
    cases.assert_right(inputs, cases.run(case, inputs))


def test_float32_is_not_rounded_on_the_way():
    """No TF32: the bound that the GPU tests hold float32 to is that of plain PyTorch in float32, so this says why."""
    from nanovllm.kernels.varlen_attention import varlen_attention

    inputs = meta_inputs(dtype=torch.float32, head_dim=64)
    (compiled,) = compile_launches(lambda: varlen_attention(**inputs))
    assert "tf32" not in compiled.ptx


MIXED = ((5, 5), (1024, 1024), (300, 1001), (1, 700), (513, 513), (64, 320), (3, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [0, 256], ids=["packed", "blocks of 256"])
@FLOAT_DTYPES
@REAL_HEADS
def test_real_shapes_on_a_gpu(num_heads, num_kv_heads, head_dim, dtype, block_size):
    """D53"""
    assert_right_on_a_gpu(Case(MIXED, block_size, num_heads, num_kv_heads, head_dim, dtype, tiles=None))


@pytest.mark.gpu
@BLOCK_SIZES
@HEAD_DIMS
@FLOAT_DTYPES
def test_every_head_size_on_a_gpu(dtype, head_dim, block_size):
    """D53"""
    assert_right_on_a_gpu(Case(((70, 200), (129, 129), (1, 64)), block_size, 4, 2, head_dim, dtype, tiles=None))


@pytest.mark.gpu
@given(
    lengths=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=8).map(
        lambda pairs: tuple((queries, queries + cached) for queries, cached in pairs)
    ),
    num_kv_heads=st.integers(1, 5),
    group_size=st.sampled_from([1, 2, 7]),
    head_dim=st.sampled_from([64, 128]),
    block_size=st.sampled_from([0, 16, 64, 512]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shape_on_a_gpu(lengths, num_kv_heads, group_size, head_dim, block_size, dtype):
    """D53"""
    num_heads = num_kv_heads * group_size
    assert_right_on_a_gpu(Case(lengths, block_size, num_heads, num_kv_heads, head_dim, dtype, tiles=None))


@pytest.mark.gpu
@BLOCK_SIZES
def test_long_prompt_on_a_gpu(block_size):
    assert_right_on_a_gpu(Case(((4100, 4100), (100, 9000)), block_size, 4, 2, 128, torch.bfloat16, tiles=None))


@pytest.mark.gpu
def test_chunks_give_what_the_whole_prompt_gives_on_a_gpu():
    """D07: a prompt of 1000 in chunks of 300, 300 and 400, over the cache; each within the bound of the reference."""
    whole = Case(((1000, 1000),), 16, 4, 2, 128, torch.bfloat16, tiles=None)
    inputs = cases.make_inputs(whole, "cuda")
    for start, end in ((0, 300), (300, 600), (600, 1000)):
        bounds = {
            "cu_seqlens_q": torch.tensor([0, end - start], dtype=torch.int32, device="cuda"),
            "cu_seqlens_k": torch.tensor([0, end], dtype=torch.int32, device="cuda"),
        }
        chunk = replace(inputs, query=inputs.query[start:end], **bounds)
        cases.assert_right(chunk, cases.run(replace(whole, lengths=((end - start, end),)), chunk))


@pytest.mark.gpu
@BLOCK_SIZES
@FLOAT_DTYPES
def test_same_bits_every_time(dtype, block_size):
    case = Case(((900, 1500), (17, 17), (640, 640)), block_size, 16, 8, 128, dtype, tiles=None)
    inputs = cases.make_inputs(case, "cuda")
    first = cases.run(case, inputs)
    for _ in range(50):
        assert torch.equal(cases.run(case, inputs), first)
