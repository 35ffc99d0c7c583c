"""The choice of attention backend: what fits, what is refused and why, and that nothing optional is imported for it."""

import logging
import re
import subprocess
import sys

import pytest
import torch

from nanovllm.attention.backend import choose_attention_backend
from nanovllm.config import ATTENTION_BACKENDS
from nanovllm.kernels import flash_attention
from nanovllm.layers import attention_backend
from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def hopper(monkeypatch):
    """A machine on which flash-attn, triton and a GPU of compute capability 9.0 seem to be there."""
    monkeypatch.setattr(flash_attention, "import_error", lambda: None)
    monkeypatch.setattr(attention_backend, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 64), (BF16, 128), (FP16, 64), (FP16, 128)])
def test_auto_takes_what_was_measured_to_be_faster(hopper, dtype, head_dim, monkeypatch, caplog):
    """On a Hopper GPU triton, if its blocks fit, and it says why; on others flash_attn."""
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        assert choose_attention_backend("auto", CUDA, dtype, head_dim, 256).name == "triton"
    assert caplog.messages == [
        f"attention backend: triton (measured to be faster than flash_attn on such a GPU at head_dim {head_dim})"
    ]
    assert choose_attention_backend("auto", CUDA, dtype, head_dim, 768).name == "flash_attn"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose_attention_backend("auto", CUDA, dtype, head_dim, 256).name == "flash_attn"


@pytest.mark.parametrize("block_size", [256, 512, 768])
def test_auto_takes_flash_attention_where_nobody_measured(hopper, block_size):
    assert choose_attention_backend("auto", CUDA, BF16, 32, block_size).name == "flash_attn"


# What flash_attn cannot do, the words that say so, and what "auto" takes instead.
UNFIT = {
    "CPU": ((CPU, BF16, 64, 256), "GPU, the device is cpu", "torch"),
    "block size of no power of two": ((CUDA, BF16, 64, 48), "must be a multiple of 256, got 48", "torch"),
    "float32": ((CUDA, FP32, 64, 256), "bfloat16 or float16, the dtype is float32", "triton"),
    "bfloat16 head size": ((CUDA, BF16, 80, 256), r"\(32, 64, 128\), the model's is 80", "torch"),
    "float16 head size": ((CUDA, FP16, 32, 256), r"\(64, 128\), the model's is 32", "triton"),
    "block size": ((CUDA, BF16, 64, 16), "kv_cache_block_size must be a multiple of 256, got 16", "triton"),
}
each_unfit = pytest.mark.parametrize(("demand", "reason", "instead"), UNFIT.values(), ids=UNFIT)


@each_unfit
def test_auto_takes_what_fits_instead(hopper, demand, reason, instead):
    assert choose_attention_backend("auto", *demand).name == instead


@each_unfit
def test_flash_attention_that_cannot_work_is_refused_with_reason_and_remedy(hopper, demand, reason, instead):
    with pytest.raises(ValueError, match=f"attention_backend='flash_attn' .*{reason}; use .*'torch'"):
        choose_attention_backend("flash_attn", *demand)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_triton_takes_what_its_kernels_take(hopper, head_dim, block_size, dtype):
    assert choose_attention_backend("triton", CUDA, dtype, head_dim, block_size).name == "triton"


@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        ((CPU, FP32, 64, 256), "GPU, the device is cpu"),
        ((CUDA, BF16, 80, 256), r"\(32, 64, 128, 256\), the model's is 80"),
        ((CUDA, BF16, 16, 256), r"\(32, 64, 128, 256\), the model's is 16"),
        ((CUDA, BF16, 64, 768), "kv_cache_block_size must be a power of two from 16, got 768"),
        ((CUDA, BF16, 64, 8), "kv_cache_block_size must be a power of two from 16, got 8"),
    ],
)
def test_triton_that_cannot_work_is_refused_with_reason_and_remedy(hopper, demand, reason):
    with pytest.raises(ValueError, match=f"attention_backend='triton' cannot be used: .*{reason}; use .*'torch'"):
        choose_attention_backend("triton", *demand)


def test_missing_flash_attention_is_refused_and_passed_over(hopper, monkeypatch):
    """D55"""
    monkeypatch.setattr(flash_attention, "import_error", lambda: "No module named 'flash_attn'")
    assert choose_attention_backend("auto", CUDA, BF16, 64, 256).name == "triton"
    with pytest.raises(ValueError, match=r"No module named 'flash_attn'.*pip install flash-attn"):
        choose_attention_backend("flash_attn", CUDA, BF16, 64, 256)


def test_missing_triton_is_refused_and_passed_over(hopper, monkeypatch):
    """D55"""
    monkeypatch.setattr(attention_backend, "find_spec", lambda name: None)
    assert choose_attention_backend("auto", CUDA, BF16, 64, 256).name == "torch"
    for name in ("flash_attn", "triton"):
        with pytest.raises(ValueError, match=r"triton.*not installed"):
            choose_attention_backend(name, CUDA, BF16, 64, 256)


def test_old_gpu_is_refused_and_passed_over(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_attention_backend("auto", CUDA, FP16, 64, 256).name == "torch"
    for name in ("flash_attn", "triton"):
        with pytest.raises(ValueError, match=r"compute capability \(8, 0\), the GPU has \(7, 5\)"):
            choose_attention_backend(name, CUDA, FP16, 64, 256)


def test_flash_attention_built_for_another_torch_is_no_crash(tmp_path, monkeypatch):
    """D55: such a build raises ImportError (undefined symbol) when imported."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert flash_attention.import_error() == "undefined symbol: _ZN3c10"


@pytest.mark.parametrize("demand", [(CPU, FP32, 24, 1), (CPU, BF16, 128, 256), (CUDA, FP32, 80, 2)])
def test_torch_takes_everything(demand):
    assert choose_attention_backend("torch", *demand).name == "torch"


def test_unknown_name_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'auto', 'flash_attn', 'triton', 'torch', got 'flash'"):
        choose_attention_backend("flash", CPU, FP32, 64, 256)


def test_every_name_that_config_takes_is_known():
    assert {"auto", *attention_backend._CANDIDATES} == set(ATTENTION_BACKENDS)


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("auto", r"attention backend: torch \(not flash_attn: .* device is cpu; not triton: .*\)"),
        ("torch", r"attention backend: torch \(as requested\)"),
    ],
)
def test_choice_and_reason_are_logged_once(caplog, requested, expected):
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        choose_attention_backend(requested, CPU, FP32, 64, 256)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("nanovllm", logging.INFO)
    assert re.fullmatch(expected, record.message)


WITHOUT_OPTIONAL_PACKAGES = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flash_attn", "triton"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import importlib, pkgutil, torch
import nanovllm, nanovllm.kernels, nanovllm.kernels.flash_attention, nanovllm.layers
for module in pkgutil.iter_modules(nanovllm.layers.__path__):
    importlib.import_module(f"nanovllm.layers.{module.name}")

from nanovllm.attention.backend import choose_attention_backend
print(choose_attention_backend("auto", torch.device("cpu"), torch.float32, 64, 256).name)
print("No module named 'flash_attn'" in nanovllm.kernels.flash_attention.import_error())
"""


def test_package_works_without_flash_attn_triton_and_gpu():
    """D55"""
    command = [sys.executable, "-c", WITHOUT_OPTIONAL_PACKAGES]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["torch", "True"]
