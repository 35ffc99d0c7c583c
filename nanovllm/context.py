"""Context: the attention metadata of the running forward pass, a ContextVar: each thread has its own.

The model's layers pass hidden states to each other; Context carries what only attention needs. It is set for one
forward pass with `with set_context(context):` and read in layers/attention.py only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEQS_PER_TILE = 32  # sequences that read a shared prefix together


@dataclass(frozen=True)
class Context:
    """Attention metadata of num_seqs sequences with num_tokens packed tokens; tensors are on the device.

    is_prefill: several query tokens a sequence (prefill), or one (decode).
    slot_mapping: [num_tokens] int64, the slot of each token's key and value; PADDING_SLOT (-1) is not stored.
    cu_seqlens_q, cu_seqlens_k: [num_seqs + 1] int32, running sums of query and key lengths.
    max_seqlen_q, max_seqlen_k: the longest of each.
    context_lens: [num_seqs] int32, key lengths, this step's tokens included.
    block_tables: [num_seqs, max_blocks] int32, padded with -1. None in a prefill in which no sequence has cached
        keys: then the keys are exactly this step's.
    sequence_order: [num_seqs] int32, the sequences by falling key length; None if they are not sorted.
    shared_prefix_order, shared_prefix_lens: [num_seqs] int32, see engine.shared_prefix.SharedPrefixes; None if this
        step shares no reading.
    """

    is_prefill: bool
    slot_mapping: "torch.Tensor"
    cu_seqlens_q: "torch.Tensor"
    cu_seqlens_k: "torch.Tensor"
    max_seqlen_q: int
    max_seqlen_k: int
    context_lens: "torch.Tensor"
    block_tables: "torch.Tensor | None"
    sequence_order: "torch.Tensor | None" = None
    shared_prefix_order: "torch.Tensor | None" = None
    shared_prefix_lens: "torch.Tensor | None" = None


_current: ContextVar[Context | None] = ContextVar("nanovllm_context", default=None)


def get_context() -> Context:
    """The running forward pass's Context. Raises RuntimeError outside `with set_context(...)`."""
    context = _current.get()
    if context is None:
        raise RuntimeError("get_context() was called outside `with set_context(...)`: attention needs a Context")
    return context


@contextmanager
def set_context(context: Context) -> Iterator[None]:
    """Make `context` the one that get_context returns, for one forward pass. Raises RuntimeError when nested."""
    if _current.get() is not None:
        raise RuntimeError("set_context() is already active: forward passes do not nest")
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
