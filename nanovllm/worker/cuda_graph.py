"""CUDAGraphRunner: decode as CUDA graphs, one captured forward pass per batch size.

A decode step is many small kernels, and launching them from Python takes longer than running them. A graph captures
the launches once and replays them with one call. A replay reads its inputs from fixed buffers of a fixed shape, so a
batch runs in the graph of the next larger batch size. The rows that pad the batch store nothing (slot PADDING_SLOT) and
attend to nothing (context length 0).
"""

import functools
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from nanovllm.context import Context
from nanovllm.engine.model_input import PADDING_SLOT, ModelInput
from nanovllm.progress import Progress
from nanovllm.worker.torch_state import gpu_lock

MAX_GRAPH_BATCH_SIZE = 512  # larger batches run eagerly: their kernels take longer than the launches

Array = TypeVar("Array")  # np.ndarray on the host, torch.Tensor on the device
Forward = Callable[[torch.Tensor, torch.Tensor, Context], torch.Tensor | None]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all graphs of a device, since cuBLAS keeps a workspace per stream until the process ends.

    On an H100 this one takes 32 MiB; one stream for each of five graphs took 224 MiB.
    """
    return torch.cuda.Stream(device)


def graph_batch_sizes(max_num_seqs: int) -> list[int]:
    """Ascending: 1, 2, 4, 8, the multiples of 16, and the largest: max_num_seqs, at most MAX_GRAPH_BATCH_SIZE."""
    largest = min(max_num_seqs, MAX_GRAPH_BATCH_SIZE)
    return sorted({size for size in (1, 2, 4, 8, *range(16, largest, 16)) if size < largest} | {largest})


def shared_prefix_batch_sizes(batch_sizes: list[int]) -> list[int]:
    """The sizes that get a second graph, which reads shared prefixes once: the multiples of 64, and the largest."""
    return [size for size in batch_sizes if size % 64 == 0 or (size == batch_sizes[-1] and size > 32)]


@dataclass(frozen=True)
class DecodeBuffers(Generic[Array]):
    """The integers of a decode step, as views of one buffer of bytes in this order, so that one copy moves them all.

    input_ids, positions, slot_mapping: [max_batch_size] int64.
    context_lens, sequence_order, shared_prefix_order, shared_prefix_lens: [max_batch_size] int32.
    block_tables: [max_batch_size, max_blocks_per_seq] int32; last, since a smaller batch needs its first rows only.
    """

    input_ids: Array
    positions: Array
    slot_mapping: Array
    context_lens: Array
    sequence_order: Array
    shared_prefix_order: Array
    shared_prefix_lens: Array
    block_tables: Array


def _views(packed: torch.Tensor, max_batch_size: int) -> DecodeBuffers[torch.Tensor]:
    """The DecodeBuffers in `packed`, a uint8 tensor."""
    int64s, int32s = packed.tensor_split((max_batch_size * 3 * 8,))
    columns, block_tables = int32s.view(torch.int32).tensor_split((max_batch_size * 4,))
    input_ids, positions, slot_mapping = int64s.view(torch.int64).view(3, max_batch_size)
    block_tables = block_tables.view(max_batch_size, -1)
    context_lens, sequence_order, shared_order, shared_lens = columns.view(4, max_batch_size)
    int32_views = (context_lens, sequence_order, shared_order, shared_lens, block_tables)
    return DecodeBuffers(input_ids, positions, slot_mapping, *int32_views)


def _fill(rows: np.ndarray, values: np.ndarray, padding: int | np.ndarray) -> None:
    rows[: len(values)] = values
    rows[len(values) :] = padding


class CUDAGraphRunner:
    """Captures a graph of `forward` for each of `batch_sizes`; they share one memory pool and one set of buffers.

    A second graph for each of shared_prefix_sizes is for batches whose sequences share enough of their beginnings.

    forward: (input_ids [B], positions [B], Context) -> logits [B, V] (None on ranks but 0). It must not wait for the
    device, and its memory and launches must depend on B alone.
    batch_sizes: ascending. max_blocks_per_seq: max_model_len / block size, rounded up.
    max_model_len: max_seqlen_k of the captured Context, whatever the lengths at a replay.
    """

    def __init__(
        self,
        forward: Forward,
        batch_sizes: list[int],
        shared_prefix_sizes: list[int],
        max_blocks_per_seq: int,
        max_model_len: int,
        device: torch.device,
        use_tqdm: bool = True,
    ) -> None:
        self.batch_sizes = batch_sizes
        self.shared_prefix_sizes = shared_prefix_sizes
        self._max_model_len = max_model_len
        max_batch_size = batch_sizes[-1]
        num_bytes = max_batch_size * (3 * 8 + 4 * 4 + max_blocks_per_seq * 4)
        self._packed_on_host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        views = _views(self._packed_on_host, max_batch_size)
        self._host = DecodeBuffers(*(view.numpy() for view in vars(views).values()))
        self._host.slot_mapping[:] = PADDING_SLOT
        self._host.sequence_order[:] = np.arange(max_batch_size)
        self._copy_done = torch.cuda.Event()  # the host buffers may be filled again
        self._packed = self._packed_on_host.to(device)
        self._buffers = _views(self._packed, max_batch_size)
        self._cu_seqlens = torch.arange(max_batch_size + 1, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}  # by size, and whether a prefix is shared
        self._logits: dict[tuple[int, bool], torch.Tensor | None] = {}
        self._capture(forward, _capture_stream(device), use_tqdm)

    def _capture(self, forward: Forward, stream: torch.cuda.Stream, use_tqdm: bool) -> None:
        pool: Any = None
        keys = [(size, False) for size in self.batch_sizes] + [(size, True) for size in self.shared_prefix_sizes]
        with Progress("Capturing CUDA graphs", len(keys), is_shown=use_tqdm) as progress:
            for key in sorted(keys, reverse=True):  # the largest first: the smaller graphs reuse its memory
                graph = torch.cuda.CUDAGraph()
                inputs = self._inputs(*key)
                with gpu_lock:
                    self._warm_up(forward, inputs, stream)
                    # thread_local: GPU calls of the program's other threads do not invalidate the capture.
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                        logits = forward(*inputs)
                pool = pool or graph.pool()
                self._graphs[key], self._logits[key] = graph, logits
                progress.update()

    @staticmethod
    def _warm_up(
        forward: Forward, inputs: tuple[torch.Tensor, torch.Tensor, Context], stream: torch.cuda.Stream
    ) -> None:
        """Compile kernels and create library handles before the capture, which forbids both."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(*inputs)
        torch.cuda.current_stream().wait_stream(stream)

    def _inputs(self, size: int, shares_prefix: bool) -> tuple[torch.Tensor, torch.Tensor, Context]:
        buffers = self._buffers
        context = Context(
            is_prefill=False,
            slot_mapping=buffers.slot_mapping[:size],
            cu_seqlens_q=self._cu_seqlens[: size + 1],
            cu_seqlens_k=self._cu_seqlens[: size + 1],  # not read in decode
            max_seqlen_q=1,
            max_seqlen_k=self._max_model_len,
            context_lens=buffers.context_lens[:size],
            block_tables=buffers.block_tables[:size],
            sequence_order=buffers.sequence_order[:size],
            shared_prefix_order=buffers.shared_prefix_order[:size] if shares_prefix else None,
            shared_prefix_lens=buffers.shared_prefix_lens[:size] if shares_prefix else None,
        )
        return buffers.input_ids[:size], buffers.positions[:size], context

    def can_replay(self, model_input: ModelInput) -> bool:
        """Whether model_input is a decode step of a batch size that a graph holds."""
        return not model_input.is_prefill and len(model_input.input_ids) <= self.batch_sizes[-1]

    def replay(self, model_input: ModelInput, input_ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """What forward returned, for a decode step: logits [num_seqs, V]. The next replay overwrites them.

        input_ids: [num_seqs] int64 on the device, in place of model_input.input_ids.
        """
        num_seqs = len(model_input.input_ids)
        shared = model_input.shared_prefixes
        shares_prefix = shared is not None and num_seqs <= max(self.shared_prefix_sizes, default=0)
        sizes = self.shared_prefix_sizes if shares_prefix else self.batch_sizes
        size = sizes[bisect_left(sizes, num_seqs)]
        self._copy_done.synchronize()
        host, block_tables = self._host, model_input.block_tables
        assert block_tables is not None
        _fill(host.input_ids, model_input.input_ids, padding=0)
        _fill(host.positions, model_input.positions, padding=0)
        _fill(host.slot_mapping, model_input.slot_mapping, padding=PADDING_SLOT)
        _fill(host.context_lens, model_input.context_lens, padding=0)
        padding_rows = np.arange(num_seqs, len(host.sequence_order))
        _fill(host.sequence_order, model_input.sequence_order, padding=padding_rows)
        if shared is not None:
            _fill(host.shared_prefix_order, shared.order, padding=padding_rows)
            _fill(host.shared_prefix_lens, shared.lens, padding=0)
        host.block_tables[:num_seqs, : block_tables.shape[1]] = block_tables
        num_bytes = self._packed.nbytes - host.block_tables[size:].nbytes
        self._packed[:num_bytes].copy_(self._packed_on_host[:num_bytes], non_blocking=True)
        self._copy_done.record()
        if input_ids is not None:
            self._buffers.input_ids[:num_seqs].copy_(input_ids)
        self._graphs[size, shares_prefix].replay()
        logits = self._logits[size, shares_prefix]
        return None if logits is None else logits[:num_seqs]

    def close(self) -> None:
        """Free the graphs and their memory; required before a process group that they use is destroyed."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._logits.clear()
