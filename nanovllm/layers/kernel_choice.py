"""Whether a layer calls its Triton kernel or computes in plain PyTorch."""

import functools
import importlib.util

import torch

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_kernels(x: torch.Tensor) -> bool:
    """Whether the kernels of nanovllm.kernels can take x, and what has its device and dtype: on a GPU with triton."""
    return x.is_cuda and x.dtype in KERNEL_DTYPES and _has_triton()


@functools.cache  # looking for a module reads the disk
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
