"""Programmatic dependent launch: a kernel is launched before the kernel in front of it has ended, and waits in place.

A kernel boundary costs about a microsecond of an idle GPU. A kernel that is launched with launch_pdl=True has its
programs placed as soon as the kernel in front calls gdc_launch_dependents() or ends; gdc_wait() then waits until that
kernel has ended and its writes are visible. So a kernel calls gdc_wait() before its first read of what the kernel in
front wrote and before its first write, and gdc_launch_dependents() after it. Then at most one kernel waits in place,
and what earlier kernels and the host wrote may be read before gdc_wait(): weights, angles, lengths and tables.
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
    """Whether a small kernel between linear layers launches early: where skinny_linear computes these.

    Measured on an H200: next to cuBLAS, whose kernels do not wait in place, a decode step took up to 7 % longer.
    """
    return num_tokens <= MAX_TOKENS and row_size <= MAX_ROW_SIZE and can_launch_early(device)
