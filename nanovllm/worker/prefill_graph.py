"""PrefillGraphRunner: short prefills as CUDA graphs, one captured forward pass per number of tokens.

The host takes about as long to launch a prefill of ten tokens as one of ten thousand: 12 to 24 ms for 28 layers, while
an H200 computes 128 tokens of Qwen3-0.6B in 1.6 ms. A request that arrives alone would wait for these launches, and so
would all running requests. A prefill runs in the graph of the next larger number of tokens. The padding tokens belong
to no sequence: their keys and values are not stored, attention does not write their rows, and no later operation uses
their results. Keys are read from the cache even if this step computed all of them, so that one graph serves prefills
with and without cached tokens.
"""

from bisect import bisect_left
from functools import partial
from typing import Any

import numpy as np
import torch

from nanovllm.context import Context
from nanovllm.engine.model_input import PADDING_SLOT, ModelInput
from nanovllm.worker.cuda_graph import CaptureOptions, GraphRunner

# Numbers of tokens. On an H200, fewer than 64 take as long as 64.
SIZES = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
MAX_GRAPH_SEQS = 8  # for each one that a prefill does not use, attention launches programs that do nothing
# In one layer. The GPU computes a larger prefill for longer than the host takes to launch it. For the 32 layers of
# Llama 3 8B, two hosts took 13 and 26 ms; an H200 took 11 ms for 512 tokens (1.7 * 2**36 multiplications), 19 for 1024.
MAX_MULTIPLICATIONS = 3 * 2**36


def prefill_graph_sizes(max_num_batched_tokens: int, parameters_per_layer: float) -> list[int]:
    """The SIZES that are worth a graph, up to the first one that is not below max_num_batched_tokens.

    parameters_per_layer: parameters of one layer that each token is multiplied with.
    """
    num_needed = bisect_left(SIZES, max_num_batched_tokens) + 1
    return [size for size in SIZES[:num_needed] if size * parameters_per_layer <= MAX_MULTIPLICATIONS]


class PrefillGraphRunner(GraphRunner):
    """Captures a graph of options.forward for each of `sizes`; a replay takes at most MAX_GRAPH_SEQS sequences.

    sizes: numbers of tokens, ascending. pool: memory shared with graphs that never run at the same time.
    """

    def __init__(self, options: CaptureOptions, sizes: list[int], pool: Any) -> None:
        super().__init__(pool)
        self.sizes = sizes
        device = options.device
        num_tokens = sizes[-1]
        self._input_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._slot_mapping = torch.full((num_tokens,), PADDING_SLOT, dtype=torch.int64, device=device)
        self._last_tokens = torch.zeros(MAX_GRAPH_SEQS, dtype=torch.int64, device=device)
        self._cu_seqlens_q = torch.zeros(MAX_GRAPH_SEQS + 1, dtype=torch.int32, device=device)
        self._cu_seqlens_k = torch.arange(MAX_GRAPH_SEQS + 1, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(MAX_GRAPH_SEQS, options.max_blocks_per_seq, dtype=torch.int32, device=device)
        self._capture("Capturing prefill graphs", sizes, partial(self._compute, options), options)

    def _compute(self, options: CaptureOptions, size: int) -> torch.Tensor:
        context = Context(
            is_prefill=True,
            slot_mapping=self._slot_mapping[:size],
            cu_seqlens_q=self._cu_seqlens_q,
            cu_seqlens_k=self._cu_seqlens_k,
            max_seqlen_q=size,
            max_seqlen_k=options.max_model_len,
            context_lens=self._cu_seqlens_k[1:],  # not read in prefill
            block_tables=self._block_tables,
        )
        return options.forward(self._input_ids[:size], self._positions[:size], context, self._last_tokens)

    def can_replay(self, model_input: ModelInput) -> bool:
        """Whether model_input is a prefill that fits into a graph."""
        num_tokens, num_seqs = len(model_input.input_ids), len(model_input.context_lens)
        return model_input.is_prefill and num_tokens <= self.sizes[-1] and num_seqs <= MAX_GRAPH_SEQS

    def replay(self, model_input: ModelInput) -> torch.Tensor:
        """This rank's columns of the last tokens' logits, [num_seqs, V/size]. The next replay overwrites them."""
        num_seqs = len(model_input.context_lens)
        size = self.sizes[bisect_left(self.sizes, len(model_input.input_ids))]
        ends, key_ends = model_input.cu_seqlens_q, model_input.cu_seqlens_k
        padding_key_ends = key_ends[-1] + np.arange(1, MAX_GRAPH_SEQS + 1 - num_seqs)
        _fill(self._input_ids[:size], model_input.input_ids, padding=0)
        _fill(self._positions[:size], model_input.positions, padding=0)
        _fill(self._slot_mapping[:size], model_input.slot_mapping, padding=PADDING_SLOT)
        _fill(self._last_tokens, ends[1:] - 1, padding=0)
        # A padding sequence has no query, but one key: the last layer computes one query of each sequence.
        _fill(self._cu_seqlens_q, ends, padding=ends[-1])
        _fill(self._cu_seqlens_k, np.concatenate((key_ends, padding_key_ends)), padding=0)
        _fill(self._block_tables, model_input.block_tables, padding=0)
        return self._replay(size, num_seqs)


def _fill(buffer: torch.Tensor, values: np.ndarray, padding: int) -> None:
    """Copy `values` to the beginning of each dimension of `buffer`, and padding to the rest, on the current stream."""
    padded = torch.full(buffer.shape, padding, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
    padded.numpy()[tuple(map(slice, values.shape))] = values
    buffer.copy_(padded, non_blocking=True)
