"""paged_attention against reference.paged_attention: interpreted on the CPU, compiled without a GPU, run on a GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import paged_attention_cases as cases
from tests.kernels.paged_attention_cases import Case
from tests.support.kernels.compiling import CAPABILITIES, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")

FLOAT_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
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
) -> dict[str, torch.Tensor]:
    """Inputs of 2 sequences that have shapes and no contents."""
    kv_cache = torch.empty(2, 4, 100, block_size, num_kv_heads, head_dim, dtype=dtype, device="meta")
    return {
        "query": torch.empty(2, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device="meta")[:, :num_heads],
        "k_cache": kv_cache[0, 0],
        "v_cache": kv_cache[1, 0],
        "block_tables": torch.empty(2, 4096 // block_size, dtype=torch.int32, device="meta"),
        "context_lens": torch.empty(2, dtype=torch.int32, device="meta"),
    }


def assert_compiles(capability: int, num_splits: int, group_size: int = 4, **shape) -> None:
    from nanovllm.kernels.paged_attention import paged_attention

    inputs = meta_inputs(num_heads=2 * group_size, **shape)
    early = capability >= 90
    launch = lambda: paged_attention(**inputs, num_splits=num_splits, starts_early=early)  # noqa: E731
    for compiled in compile_launches(launch, capability):
        assert ("griddepcontrol.wait" in compiled.ptx) == early
        # Half of what a Hopper multiprocessor has, so that two programs share it.
        assert_fits(compiled, max_registers=255, max_shared_bytes=113 * 1024)


@HEAD_DIMS
@FLOAT_DTYPES
def test_compiled_for_every_head_size(dtype, head_dim):
    assert_compiles(90, num_splits=8, dtype=dtype, head_dim=head_dim, block_size=256)


@HEAD_DIMS
def test_compiled_for_tiles_of_several_blocks(head_dim):
    assert_compiles(90, num_splits=1, dtype=torch.bfloat16, head_dim=head_dim, block_size=16)


@CAPABILITIES
@pytest.mark.parametrize("group_size", [1, 7, 16])
def test_compiled_for_every_gpu(capability, group_size):
    assert_compiles(capability, num_splits=1, dtype=torch.bfloat16, head_dim=128, block_size=256, group_size=group_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": (2, 4, 96), "k_cache": (9, 16, 2, 96), "v_cache": (9, 16, 2, 96)}, "head_dim must be one of"),
        ({"v_cache": (9, 16, 1, 32)}, "one shape"),
        ({"k_cache": (9, 16, 2, 64), "v_cache": (9, 16, 2, 64)}, "query's head_dim"),
        ({"k_cache": (9, 8, 2, 32), "v_cache": (9, 8, 2, 32)}, "block_size must be a power of two from 16"),
        ({"k_cache": (9, 48, 2, 32), "v_cache": (9, 48, 2, 32)}, "block_size must be a power of two from 16"),
        ({"query": (2, 5, 32)}, "must be a multiple of k_cache's"),
        ({"block_tables": (3, 8)}, "a row a query"),
        ({"context_lens": (3,)}, "a row a query"),
        ({"sequence_order": (3,)}, "sequence_order must be"),
        ({"out": (2, 4, 16)}, "out must have"),
    ],
)
def test_other_shapes_are_refused(changes, message):
    from nanovllm.kernels.paged_attention import paged_attention

    inputs = meta_inputs()
    for name, shape in changes.items():
        is_integer = name in ("block_tables", "context_lens", "sequence_order")
        inputs[name] = torch.empty(shape, dtype=torch.int32 if is_integer else torch.float16, device="meta")
    with pytest.raises(ValueError, match=message):
        paged_attention(**inputs)


@pytest.mark.parametrize("name", ["query", "k_cache", "v_cache"])
def test_dtypes_that_differ_are_refused(name):
    from nanovllm.kernels.paged_attention import paged_attention

    inputs = meta_inputs()
    with pytest.raises(ValueError, match="must have one dtype"):
        paged_attention(**{**inputs, name: inputs[name].float()})


def test_other_dtypes_are_refused():
    from nanovllm.kernels.paged_attention import paged_attention

    with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
        paged_attention(**meta_inputs(dtype=torch.float64))


@pytest.mark.parametrize("name", ["block_tables", "context_lens"])
def test_int64_tables_are_refused(name):
    from nanovllm.kernels.paged_attention import paged_attention

    inputs = meta_inputs()
    with pytest.raises(ValueError, match="must be int32"):
        paged_attention(**{**inputs, name: inputs[name].long()})


@pytest.mark.parametrize("name", ["query", "k_cache", "v_cache", "block_tables"])
def test_strided_last_dimensions_are_refused(name):
    from nanovllm.kernels.paged_attention import paged_attention

    inputs = meta_inputs()
    strided = torch.empty((*inputs[name].shape, 2), dtype=inputs[name].dtype, device="meta")[..., 0]
    with pytest.raises(ValueError, match="last dimensions must be contiguous"):
        paged_attention(**{**inputs, name: strided})


@pytest.mark.parametrize("num_seqs", [1, 2, 3, 8, 33, 64, 256, 512])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("max_context_len", [16, 4096, 131072])
def test_splits_fill_the_gpu_once(num_seqs, num_kv_heads, max_context_len):
    """At most 2 programs a multiprocessor, and more would be too many or have no keys, or the keys are not split."""
    from nanovllm.kernels.paged_attention import choose_num_splits

    splits = choose_num_splits(num_seqs, num_kv_heads, max_context_len, 132)
    programs = num_seqs * num_kv_heads
    assert splits == 1 or programs * splits <= 264
    assert programs * (splits + 1) > 264 or splits * 32 >= max_context_len


@pytest.mark.parametrize(("num_seqs", "num_kv_heads", "splits"), [(1, 8, 33), (8, 8, 4), (64, 8, 1), (256, 8, 1)])
def test_splits_that_were_measured_to_be_best(num_seqs, num_kv_heads, splits):
    from nanovllm.kernels.paged_attention import choose_num_splits

    assert choose_num_splits(num_seqs, num_kv_heads, 32768, 132) == splits


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    """D52, D53"""
    cases.CHECKS[name]("cuda")


def assert_right_on_a_gpu(case: Case) -> None:
    inputs = cases.make_inputs(case, "cuda")
    out = torch.full_like(inputs.query, torch.nan)
    cases.run(case, inputs, out=out)
    cases.assert_right(inputs, out)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("num_seqs", [1, 8, 64])
@FLOAT_DTYPES
@REAL_HEADS
def test_real_shapes_on_a_gpu(num_heads, num_kv_heads, head_dim, dtype, num_seqs, block_size):
    """D53. Split or not as the launcher chooses."""
    generator = torch.Generator().manual_seed(num_seqs)
    lengths = torch.randint(1, 1800, (num_seqs,), generator=generator).tolist()
    assert_right_on_a_gpu(
        Case((*lengths[1:], 2048), num_heads, num_kv_heads, head_dim, block_size, dtype, num_splits=None)
    )


@pytest.mark.gpu
@given(
    context_lens=st.lists(st.integers(0, 700), max_size=20).map(tuple),
    num_kv_heads=st.integers(1, 9),
    group_size=st.integers(1, 20),
    head_dim=st.sampled_from([32, 64, 128, 256]),
    block_size=st.sampled_from([16, 32, 64, 128, 256, 512]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    num_splits=st.none() | st.integers(1, 80),
    is_ordered=st.booleans(),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shape_on_a_gpu(
    context_lens, num_kv_heads, group_size, head_dim, block_size, dtype, num_splits, is_ordered
):
    """D53"""
    num_heads = num_kv_heads * group_size
    case = Case(context_lens, num_heads, num_kv_heads, head_dim, block_size, dtype, 1.0, num_splits)
    assert_right_on_a_gpu(replace(case, is_ordered=is_ordered))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, None])
def test_longest_context_on_a_gpu(num_splits):
    assert_right_on_a_gpu(Case((131072, 1), 8, 2, 128, 256, torch.bfloat16, num_splits=num_splits))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, None])
def test_graph_replays_with_other_lengths_and_tables(num_splits):
    """Captured over contexts of 0, as a padded batch has them; then longer, shorter and none again."""
    case = Case((700, 3, 0, 256, 1025), 16, 8, 128, 16, torch.bfloat16, num_splits=num_splits)
    full = cases.make_inputs(case, "cuda")
    order = torch.arange(5, dtype=torch.int32, device="cuda")
    live = replace(full, block_tables=full.block_tables.clone(), context_lens=torch.zeros_like(full.context_lens))
    cases.run(case, live, sequence_order=order)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cases.run(case, live, sequence_order=order)
    for rows in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 1, 2, 2, 1], [2, 2, 2, 2, 2]):
        step = replace(full, block_tables=full.block_tables[rows], context_lens=full.context_lens[rows])
        live.block_tables.copy_(step.block_tables)
        live.context_lens.copy_(step.context_lens)
        order.copy_(step.context_lens.argsort(descending=True))
        output.fill_(torch.nan)
        graph.replay()
        cases.assert_right(step, output)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, None])
def test_same_bits_every_time(num_splits):
    case = Case((900, 17, 2000, 64), 16, 8, 128, 256, torch.bfloat16, num_splits=num_splits)
    inputs = cases.make_inputs(case, "cuda")
    first = cases.run(case, inputs)
    for _ in range(50):
        assert torch.equal(cases.run(case, inputs), first)
