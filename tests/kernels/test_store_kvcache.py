"""store_kvcache against reference.store_kvcache: interpreted on the CPU, compiled without a GPU, run on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from tests.source_tree import ROOT

triton = pytest.importorskip("triton")


def test_interpreted():
    """D51, D52: the process dies at the first case that fails, whose name is the last it printed."""
    command = [sys.executable, "-m", "tests.kernels.store_kvcache_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.splitlines()[-1] == "done"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_compiles_for_hopper_without_a_gpu(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanovllm.kernels.store_kvcache import store_kvcache_kernel

    pointers = dict.fromkeys(("key_ptr", "value_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{dtype}")
    strides = ("key_token_stride", "key_head_stride", "value_token_stride", "value_head_stride", "row_size")
    constants = {"HEAD_DIM": 64, "TILE_SIZE": 256}
    signature = {
        **pointers,
        "slot_mapping_ptr": "*i64",
        **dict.fromkeys(strides, "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(fn=store_kvcache_kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared == 0, "nothing to share: each element is read and written by one thread"


@pytest.fixture
def cases():
    from tests.kernels import store_kvcache_cases

    return store_kvcache_cases


@pytest.mark.gpu
def test_on_a_gpu(cases):
    for name, case in cases.CASES.items():
        print(name)
        cases.check(case, "cuda")
    cases.check_strides("cuda")


@pytest.mark.gpu
def test_on_a_gpu_beyond_2_31_elements(cases):
    """D52"""
    cases.check_far_slot("cuda")
    torch.cuda.empty_cache()
