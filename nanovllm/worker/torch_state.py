"""What torch's per-thread settings of the calling program are not to change in the engine's computing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A graph capture and what another thread does on a GPU meanwhile (allocate, synchronise the device) break each other:
# an engine that captures, launches or synchronises the device holds this, since it may not be the only one.
gpu_lock = threading.RLock()


@contextmanager
def plain_torch_state(device: torch.device, is_inference: bool) -> Iterator[None]:
    """Compute on `device` in torch's initial state, whatever surrounds the call; restored afterwards.

    Covered, all of this thread alone: autocast, torch.inference_mode and grad mode (is_inference says which), the
    default device and other TorchFunctionModes, the current GPU and stream. The engine always uses a GPU's default
    stream, so that steps of several threads are in order. torch's default dtype is one for all threads: it is left
    alone, and each tensor's dtype is stated where it is made.
    """
    modes = _pop_function_modes()
    try:
        with (
            torch.cuda.stream(torch.cuda.default_stream(device) if device.type == "cuda" else None),
            torch.autocast(device.type, enabled=False),
            torch.inference_mode(is_inference),
        ):
            yield
    finally:
        for mode in modes:
            torch._C._push_on_torch_function_stack(mode)


def _pop_function_modes() -> list[object]:
    """The TorchFunctionModes of this thread, the outermost first; there are none afterwards. torch.set_default_device
    and `with torch.device(...)` are such modes.
    """
    num_modes = torch._C._len_torch_function_stack()
    return [torch._C._pop_torch_function_stack() for _ in range(num_modes)][::-1]
