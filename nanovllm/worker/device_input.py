"""make_context: the integers of a ModelInput as a Context on the device."""

from collections.abc import Callable

import numpy as np
import torch

from nanovllm.context import Context
from nanovllm.engine.model_input import ModelInput


def make_context(model_input: ModelInput, to_device: Callable[[np.ndarray], torch.Tensor]) -> Context:
    """The Context of a step that no CUDA graph computes."""
    shared = model_input.shared_prefixes
    return Context(
        is_prefill=model_input.is_prefill,
        slot_mapping=to_device(model_input.slot_mapping),
        cu_seqlens_q=to_device(model_input.cu_seqlens_q),
        cu_seqlens_k=to_device(model_input.cu_seqlens_k),
        max_seqlen_q=model_input.max_seqlen_q,
        max_seqlen_k=model_input.max_seqlen_k,
        context_lens=to_device(model_input.context_lens),
        block_tables=to_device(model_input.block_tables) if model_input.reads_cache else None,
        sequence_order=to_device(model_input.sequence_order),
        shared_prefix_order=None if shared is None else to_device(shared.order),
        shared_prefix_lens=None if shared is None else to_device(shared.lens),
    )
