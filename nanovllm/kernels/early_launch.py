"""Programmatic dependent launch: a kernel starts before the preceding kernel has ended, and waits on the GPU.

A kernel boundary leaves the GPU idle for about a microsecond. The programs of a kernel that is launched with
launch_pdl=True are placed as soon as the preceding kernel calls gdc_launch_dependents() or ends; gdc_wait() then waits
until that kernel has ended and its writes are visible. So a kernel calls gdc_wait() before its first read of data that
the preceding kernel wrote and before its first write, and gdc_launch_dependents() after it. Then at most one kernel
waits, and data of the host and of earlier kernels may be read before gdc_wait(): weights, angles, lengths and tables.
"""

from functools import cache

import torch

MAX_TOKENS = 16
MAX_ROW_SIZE = 4096


@cache
def can_launch_early(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch: an NVIDIA GPU of compute capability 9.0 or more."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def pays_between_linear_layers(device: torch.device, num_tokens: int, row_size: int) -> bool:
    """Whether a small kernel between linear layers launches early: if skinny_linear computes these layers.

    On an H200, with cuBLAS, whose kernels do not wait in this way, a decode step took up to 7 % longer.
    """
    return num_tokens <= MAX_TOKENS and row_size <= MAX_ROW_SIZE and can_launch_early(device)
