"""ModuleCalls: counts calls of torch's modules in a `with` block; can raise an error inside any engine at one of them.

Not a torch function mode: an engine may rightly shield its steps from the modes of its user, as ours does.
"""

from typing import Any
from unittest import mock

import torch


class PlantedError(RuntimeError):
    pass


class ModuleCalls:
    """Counts calls of torch.nn.Module, in all threads; call number `fail_at`, counted from 1, raises PlantedError.

    number: how many there were. An engine that computes in another process has none here.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.number = 0
        self.fail_at = fail_at

    def __enter__(self) -> "ModuleCalls":
        call = torch.nn.Module.__call__

        def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.number += 1
            if self.number == self.fail_at:
                raise PlantedError(f"planted at call {self.number} of a module, {type(module).__name__}")
            return call(module, *args, **kwargs)

        self._patch = mock.patch.object(torch.nn.Module, "__call__", counted)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()
