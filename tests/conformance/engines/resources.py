"""What a process holds while engines come and go, tensors included, so that a contract can check that it comes back."""

import atexit
import gc
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.support.resource_snapshot import ResourceSnapshot, Watch


class Held(NamedTuple):
    """tensor_bytes: of all tensors that Python can reach, on every device, each storage counted once."""

    of_system: ResourceSnapshot
    tensor_bytes: int


class Watching:
    """Call it for what the process holds now. Until stop(), the names of shared memory tell it from other programs'."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nanovllm-watch-"))
        self._watch = self._stack.enter_context(Watch(Path(directory)).watching())
        atexit.register(self.stop)

    def __call__(self) -> Held:
        snapshot = self._watch.snapshot()  # collects garbage first
        return Held(snapshot, _tensor_bytes())

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self._stack.close()


def growth(before: Held, after: Held) -> dict[str, Any]:
    """Field -> what `after` has and `before` has not: items of a set, or the difference of two numbers."""
    pairs: list[Any] = [*zip(ResourceSnapshot._fields, before.of_system, after.of_system, strict=True)]
    pairs.append(("tensor_bytes", before.tensor_bytes, after.tensor_bytes))
    differences = {name: new - old for name, old, new in pairs}
    return {name: value for name, value in differences.items() if value and not (isinstance(value, int) and value < 0)}


def _tensor_bytes() -> int:
    # type(), since isinstance() would load what stands behind lazy modules.
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and _has_storage(item)]
    return sum({item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}.values())


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout == torch.strided
