"""plain_torch_state: steps are computed in torch's initial state, whatever the calling program has set."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A graph capture and another thread that allocates memory or synchronises the device meanwhile make each other fail. So
# every engine of the process holds this lock while it captures, launches or synchronises.
gpu_lock = threading.RLock()


@contextmanager
def plain_torch_state(device: torch.device, is_inference: bool) -> Iterator[None]:
    """torch's initial state in the `with` block, for computing on `device`; the caller's state is restored afterwards.

    Sets, for this thread alone: autocast, inference mode and grad mode (is_inference), the default device and other
    TorchFunctionModes, the current GPU and stream. The engine uses the GPU's default stream, which puts the steps of
    several threads in order. torch's default dtype belongs to all threads, so it is not set; the engine states the
    dtype of each tensor instead.
    """
    # This thread's TorchFunctionModes, the innermost first. torch.set_default_device and torch.device() are such modes.
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with (
            torch.cuda.stream(torch.cuda.default_stream(device) if device.type == "cuda" else None),
            torch.autocast(device.type, enabled=False),
            torch.inference_mode(is_inference),
        ):
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)
