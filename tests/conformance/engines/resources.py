"""What a process holds while engines come and go, tensors included, so that a contract can check that it comes back."""

import atexit
import gc
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.support.resource_snapshot import Watch


class Watching:
    """Call it for what the process holds now. Until stop(), the names of shared memory tell it from other programs'."""

    running: ClassVar[list["Watching"]] = []

    def __init__(self) -> None:
        self.running.append(self)
        self._stack = ExitStack()
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nanovllm-watch-"))
        self._watch = self._stack.enter_context(Watch(Path(directory)).watching())
        atexit.register(self.stop)

    def __call__(self) -> dict[str, Any]:
        return {**self._watch.snapshot()._asdict(), "tensor_bytes": _tensor_bytes()}  # snapshot() collects garbage

    def stop(self) -> None:
        self.running.remove(self)
        atexit.unregister(self.stop)
        self._stack.close()


def growth(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Resource -> what `after` has and `before` has not: items of a set, or the difference of two numbers."""
    differences = {name: value - before[name] for name, value in after.items()}
    return {name: value for name, value in differences.items() if value and not (isinstance(value, int) and value < 0)}


def _tensor_bytes() -> int:
    """Of all tensors that Python can reach, on every device, each storage counted once."""
    # type(), since isinstance() would load what stands behind lazy modules.
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and _has_storage(item)]
    return sum({item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}.values())


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout == torch.strided
