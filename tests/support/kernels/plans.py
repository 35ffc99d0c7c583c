"""What FlashInfer needs before its kernels run: pages instead of block tables, and a plan.

Both follow from the step's lengths on the host, so they are made at every call. While a CUDA graph is recorded that is
not possible: see keep_plans.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_keeps_plans = False


def keep_plans() -> None:
    """A CUDA graph may be recorded with what followed from these inputs at the call before, as benchmarks need it.

    The graph is then right only for the lengths of that time. Otherwise recording raises NotImplementedError.
    """
    global _keeps_plans
    _keeps_plans = True


class Pages(NamedTuple):
    """FlashInfer's block tables: sequence b has the pages indices[indptr[b] : indptr[b + 1]], all full but the last."""

    indptr: Tensor  # [B + 1] int32
    indices: Tensor  # [number of pages] int32
    last_page_len: Tensor  # [B] int32, 0 for a sequence without keys


def pages_of(block_tables: Tensor, context_lens: Tensor, block_size: int) -> Pages:
    """
    >>> tables, lens = torch.tensor([[4, 2], [7, -1]], dtype=torch.int32), torch.tensor([20, 16], dtype=torch.int32)
    >>> [part.tolist() for part in pages_of(tables, lens, 16)]
    [[0, 2, 3], [4, 2, 7], [4, 16]]
    """
    num_pages = (context_lens + block_size - 1) // block_size
    is_used = torch.arange(block_tables.shape[1], device=block_tables.device) < num_pages[:, None]
    indptr = torch.zeros(len(context_lens) + 1, dtype=torch.int32, device=context_lens.device)
    indptr[1:] = num_pages.cumsum(0)
    last_page_len = context_lens - (num_pages - 1).clamp(min=0) * block_size
    return Pages(indptr, block_tables[is_used], last_page_len.int())


class Plans:
    """What follows from a call's lengths, computed at each call, but found again while a CUDA graph is recorded."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[Any, Any]] = {}

    def get(self, lengths: Tensor, make: Callable[[], Any]) -> Any:
        if not (lengths.is_cuda and torch.cuda.is_current_stream_capturing()):
            plan, number = make(), id(lengths)
            self._by_id[number] = weakref.ref(lengths, lambda _: self._by_id.pop(number, None)), plan
            return plan
        reference, plan = self._by_id.get(id(lengths), (lambda: None, None))
        if not _keeps_plans or reference() is not lengths:
            raise NotImplementedError("it plans on the host, which no CUDA graph can record")
        return plan
