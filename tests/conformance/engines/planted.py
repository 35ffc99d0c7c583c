"""TorchCalls: counts the calls of torch in a `with` block, and can raise an error inside any engine at one of them."""

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class PlantedError(RuntimeError):
    pass


class TorchCalls(TorchFunctionMode):
    """Counts torch functions that this thread calls; call number `fail_at`, counted from 1, raises PlantedError.

    number: how many there were. An engine that computes in another thread or process has none.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.number = 0
        self.fail_at = fail_at

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.number += 1
        if self.number == self.fail_at:
            raise PlantedError(f"planted at call {self.number} of torch, {getattr(function, '__name__', function)}")
        return function(*args, **(kwargs or {}))
