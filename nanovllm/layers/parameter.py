"""Parameters with a weight_loader.

models/loader.py finds the parameter for each tensor of a checkpoint. Its weight_loader checks the shape and copies this
rank's shard.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

WeightLoader = Callable[..., None]
WHOLE = (None,)  # shard_ids of a parameter that is one tensor in the checkpoint


_dtype: ContextVar[torch.dtype | None] = ContextVar("parameter_dtype", default=None)


@contextmanager
def parameter_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the dtype of the parameters that make_parameter makes in this thread.

    torch.set_default_dtype would set it for all threads.
    """
    token = _dtype.set(dtype)
    try:
        yield
    finally:
        _dtype.reset(token)


class ShapeError(ValueError):
    """A checkpoint's tensor has another shape than the model expects."""


def make_parameter(
    shape: tuple[int, ...], weight_loader: WeightLoader, shard_ids: tuple[Hashable, ...] = WHOLE
) -> nn.Parameter:
    """An uninitialised parameter without gradient, of the dtype of parameter_dtype (else torch's default) and on the
    default device.

    weight_loader(param, loaded_weight[, shard_id]) copies this rank's shard of a checkpoint's tensor, cast to the
    parameter's dtype. shard_ids: every value of shard_id with which weight_loader must be called to load the whole
    parameter; (None,) means one call without shard_id.
    """
    param: Any = nn.Parameter(torch.empty(shape, dtype=_dtype.get()), requires_grad=False)
    param.weight_loader = weight_loader
    param.shard_ids = shard_ids
    return param


def require_shape(loaded_weight: Tensor, expected: list[int]) -> None:
    """Raise ShapeError unless loaded_weight has the shape `expected`."""
    if list(loaded_weight.shape) != expected:
        raise ShapeError(f"expected shape {expected}, got {list(loaded_weight.shape)}")


def load_shard(target: Tensor, loaded_weight: Tensor, dim: int = 0, index: int = 0, count: int = 1) -> None:
    """Copy shard `index` of `count` equal shards of loaded_weight, divided along dim, into target.

    Raises ShapeError unless loaded_weight has target's shape with dimension dim `count` times as long: nothing is
    broadcast, cut off or padded.
    """
    expected = list(target.shape)
    expected[dim] *= count
    require_shape(loaded_weight, expected)
    target.copy_(loaded_weight.narrow(dim, index * target.shape[dim], target.shape[dim]))


def load_replicated(param: nn.Parameter, loaded_weight: Tensor) -> None:
    """The weight_loader of a parameter that every rank holds in full."""
    load_shard(param, loaded_weight)
