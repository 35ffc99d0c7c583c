"""Context: attention metadata of the running step."""

from dataclasses import dataclass

import torch


@dataclass
class Context:
    is_prefill: bool = False
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    slot_mapping: torch.Tensor | None = None
    context_lens: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None


_context = Context()


def get_context():
    return _context


def set_context(is_prefill, **fields):
    global _context
    _context = Context(is_prefill, **fields)
