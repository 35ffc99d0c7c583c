"""The selection of an attention backend: what is supported, what is refused and why, and what is imported for it."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from nanovllm import kernels
from nanovllm.attention.backend import AttentionRequirements
from nanovllm.attention.select import BACKENDS, select_attention_backend
from nanovllm.config import ATTENTION_BACKENDS
from nanovllm.kernels import flash_attention
from tests.support.programs import run_python

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def selected(requested: str, *requirements) -> str:
    return select_attention_backend(requested, AttentionRequirements(*requirements)).name


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which flash-attn, triton and a GPU of compute capability 9.0 seem to be there."""
    monkeypatch.setattr(flash_attention, "import_error", lambda: None)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 64), (BF16, 128), (FP16, 64), (FP16, 128)])
def test_auto_takes_what_was_measured_to_be_faster(hopper, dtype, head_dim, monkeypatch, caplog) -> None:
    """On a Hopper GPU triton, if its blocks fit, and it says why; on others flash_attn."""
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        assert selected("auto", CUDA, dtype, head_dim, 256) == "triton"
    assert caplog.messages == [
        f"attention backend: triton (measured to be faster than flash_attn on such a GPU at head_dim {head_dim})"
    ]
    assert selected("auto", CUDA, dtype, head_dim, 768) == "flash_attn"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert selected("auto", CUDA, dtype, head_dim, 256) == "flash_attn"


# Requirements; why flash_attn and why triton do not support them, None where it does.
CASES = {
    "not measured": ((CUDA, BF16, 32, 256), None, None),
    "no power of two": ((CUDA, BF16, 32, 768), None, "must be a power of two from 16, got 768"),
    "CPU": ((CPU, BF16, 64, 256), "GPU, the device is cpu", "GPU, the device is cpu"),
    "float32": ((CUDA, FP32, 256, 256), "bfloat16 or float16, the dtype is float32", None),
    "float64": ((CUDA, FP64, 64, 256), "bfloat16 or float16, the dtype is float64", "or bfloat16, .* is float64"),
    "head_dim": ((CUDA, BF16, 80, 256), r"\(32, 64, 128\), the model's is 80", r"128, 256\), the model's is 80"),
    "float16 head_dim": ((CUDA, FP16, 32, 256), r"\(64, 128\), the model's is 32", None),
    "block size": ((CUDA, BF16, 64, 16), "must be a multiple of 256, got 16", None),
    "small block size": ((CUDA, BF16, 64, 8), "must be a multiple of 256, got 8", "of two from 16, got 8"),
}


@pytest.mark.parametrize(("requirements", "flash_attn_reason", "triton_reason"), CASES.values(), ids=CASES)
def test_what_is_unsupported_is_passed_over_or_refused(hopper, requirements, flash_attn_reason, triton_reason) -> None:
    """By "auto", and by name with reason and remedy; torch supports everything."""
    reasons = {"flash_attn": flash_attn_reason, "triton": triton_reason, "torch": None}
    assert selected("auto", *requirements) == next(name for name, reason in reasons.items() if reason is None)
    for name, reason in reasons.items():
        if reason is None:
            assert selected(name, *requirements) == name
        else:
            with pytest.raises(ValueError, match=f"attention_backend='{name}' cannot be .*{reason}; use .*'torch'"):
                selected(name, *requirements)


MISSING = {
    "flash-attn": (flash_attention, "import_error", "No module", ["flash_attn"], "No module.*pip install flash-attn"),
    "triton": (kernels, "find_spec", None, ["flash_attn", "triton"], "triton is not installed"),
    "capability": (torch.cuda, "get_device_capability", (7, 5), ["flash_attn", "triton"], r"\(8, 0\), the GPU has \(7"),
}


@pytest.mark.parametrize(("module", "function", "answer", "unsupported", "reason"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_passed_over_or_refused(
    hopper, monkeypatch, module, function, answer, unsupported, reason
) -> None:
    """D55"""
    monkeypatch.setattr(module, function, lambda *args: answer)
    assert selected("auto", CUDA, FP16, 64, 256) == ("torch" if "triton" in unsupported else "triton")
    for name in unsupported:
        with pytest.raises(ValueError, match=reason):
            selected(name, CUDA, FP16, 64, 256)


def test_flash_attention_built_for_another_torch_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D55: such a build raises ImportError (undefined symbol) when imported."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert flash_attention.import_error() == "undefined symbol: _ZN3c10"


def test_the_names_are_those_that_config_accepts() -> None:
    assert {"auto", *BACKENDS} == set(ATTENTION_BACKENDS)


WITHOUT_OPTIONAL_PACKAGES = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flash_attn", "triton"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from nanovllm.attention.backend import AttentionRequirements
from nanovllm.kernels import flash_attention
from nanovllm.layers.select_ops import select_ops
import nanovllm.worker.model_runner

print(select_ops("auto", AttentionRequirements(torch.device("cpu"), torch.float32, 64, 256)).attention.name)
print("No module named 'flash_attn'" in flash_attention.import_error())
"""


def test_package_works_without_flash_attn_triton_and_gpu() -> None:
    """D55"""
    result = run_python("-c", WITHOUT_OPTIONAL_PACKAGES)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["torch", "True"]
