"""store_kvcache against reference.store_kvcache: interpreted on the CPU, compiled without a GPU, run on a GPU."""

import pytest
import torch

from tests.kernels import store_kvcache_cases as cases
from tests.support.kernels.compiling import TARGETS, assert_fits, compile_launches
from tests.support.kernels.interpreting import run_interpreted

pytest.importorskip("triton")


def test_interpreted():
    """D51, D52"""
    run_interpreted(cases.__name__)


@TARGETS
@pytest.mark.parametrize("num_kv_heads_and_head_dim", [(8, 128), (4, 128), (2, 64), (3, 80), (8, 256)], ids=str)
def test_compiled(capability, num_kv_heads_and_head_dim, dtype):
    from nanovllm.kernels.store_kvcache import store_kvcache

    heads, dim = num_kv_heads_and_head_dim
    qkv = torch.empty(9, 4 * heads, dim, dtype=dtype, device="meta")
    _, key, value = qkv.split([2 * heads, heads, heads], dim=1)
    cache = torch.empty(100, 256, heads, dim, dtype=dtype, device="meta")
    slots = torch.empty(9, dtype=torch.int64, device="meta")
    (compiled,) = compile_launches(lambda: store_kvcache(key, value, cache, cache, slots), capability)
    assert_fits(compiled, max_registers=64, max_shared_bytes=0)  # each element is read and written by one thread


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": (3, 2, 32)}, "key and value must be"),
        ({"k_cache": (2, 16, 2, 32)}, "k_cache and v_cache must be"),
        ({"k_cache": (2, 16, 4, 16), "v_cache": (2, 16, 4, 16)}, "k_cache and v_cache must be"),
        ({"slot_mapping": (2,)}, "one slot a token"),
    ],
)
def test_other_shapes_are_refused(change, message):
    from nanovllm.kernels.store_kvcache import store_kvcache

    shapes = {"key": (3, 2, 16), "value": (3, 2, 16), "k_cache": (2, 16, 2, 16), "v_cache": (2, 16, 2, 16)}
    shapes |= {"slot_mapping": (3,), **change}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        store_kvcache(**tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CHECKS)
def test_on_a_gpu(name):
    """D51, D52"""
    cases.CHECKS[name]("cuda")
