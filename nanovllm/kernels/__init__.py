"""One file a kernel: the kernel and its launcher. Imports torch and triton (or flash_attn) only."""

from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # all Triton kernels of this package take these


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot compute with tensors of this device and dtype; None if they can."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, the device is {device}"
    if dtype not in DTYPES:
        return f"it computes in float32, float16 or bfloat16, the dtype is {str(dtype).removeprefix('torch.')}"
    if find_spec("triton") is None:
        return "triton is not installed, see `pip install triton`"
    return None
