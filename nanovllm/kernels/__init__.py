"""GPU kernels. Each file holds one kernel and the function that launches it.

The files import torch, triton or flash_attn, and each other; of nanovllm's other modules, only all_reduce imports one:
distributed.peer_memory, which lays out the buffers.
"""

from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # every Triton kernel of this package supports these
HEAD_DIMS = (32, 64, 128, 256)  # of the attention kernels
MIN_BLOCK_SIZE = 16  # tokens per KV block, likewise


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot compute with tensors of this device and dtype; None if they can."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, the device is {device}"
    if dtype not in DTYPES:
        return f"it computes in float32, float16 or bfloat16, the dtype is {str(dtype).removeprefix('torch.')}"
    if find_spec("triton") is None:
        return "triton is not installed, see `pip install triton`"
    return None
