"""Tensors between guard margins: a kernel that writes outside of a tensor, or changes an input, is noticed."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.support.comparing import same_bits

ALLOCATIONS = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
}
MARGIN = 4096  # elements on each side: more than a tile, so that what runs over by a tile meets them


class Guards(TorchFunctionMode):
    """Gives tensors between margins of NaN (the largest number, if integers), in one buffer each.

    Each buffer has a NaN with other bits, so that a value which a kernel reads from one margin and stores in another is
    detected.

    Inside `with guards:` torch.empty and its like are guarded too, and start as NaN: so are a launcher's outputs and
    scratch. At its end, assert_intact() raises unless all margins, and all tensors given by `read`, are as they were.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(0)
        self._buffers: list[tuple[torch.Tensor, tuple[slice, ...], torch.Tensor]] = []
        self._read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, strides included, that kernels must leave as it is. Views of it are welcome."""
        copy = self._make(tensor.shape, tensor.stride(), tensor.dtype, tensor)
        self._read.append((copy, copy.clone()))
        return copy

    def randn(self, *shape: int, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        """read() of normal numbers: the same on every device, others at every call."""
        return self.read((mean + std * torch.randn(shape, generator=self._generator)).to(dtype))

    def unwritten(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor full of NaN."""
        return self._make(shape, torch.empty(shape, device="meta").stride(), dtype)

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            self.assert_intact()

    def assert_intact(self) -> None:
        for buffer, margins, poison in self._buffers:
            for margin in margins:
                is_intact = same_bits(buffer[margin], poison.repeat(MARGIN))
                assert is_intact, f"written outside a tensor of {buffer.numel() - 2 * MARGIN} elements"
        for tensor, before in self._read:
            assert same_bits(tensor, before), f"an input of shape {list(tensor.shape)} was changed"

    def _make(self, shape: Any, stride: Any, dtype: torch.dtype, content: torch.Tensor | None = None) -> torch.Tensor:
        """Filled on the CPU and moved in one copy, margins and all: compute-sanitizer sees that as writing."""
        size = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
        poison = _poison(dtype, len(self._buffers))
        buffer = poison.repeat(size + 2 * MARGIN)
        if content is not None:
            buffer.as_strided(shape, stride, MARGIN).copy_(content)
        buffer = buffer.to(self.device)
        self._buffers.append((buffer, (slice(0, MARGIN), slice(MARGIN + size, None)), poison.to(self.device)))
        return buffer.as_strided(shape, stride, MARGIN)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS and result.device.type == self.device.type and result.numel():
            return self._make(result.shape, result.stride(), result.dtype)
        return result


def _poison(dtype: torch.dtype, number: int) -> torch.Tensor:
    """[1]: a NaN whose last bits say `number` (up to 63), the largest integer, or True."""
    if not dtype.is_floating_point:
        return torch.tensor([True if dtype == torch.bool else torch.iinfo(dtype).max], dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return (torch.tensor([torch.nan], dtype=dtype).view(bits) | (1 + number % 63)).view(dtype)
