"""Decode in CUDA graphs: one recorded forward pass a batch size, replayed with new integers.

A decode step is many small kernels, and launching them from Python takes longer than running them. A graph records the
launches once and replays them with one call. What a replay computes may depend on the contents of its buffers only,
never on their shape: so there is one graph a batch size, and a batch runs in the next larger one, padded with rows that
store nothing (slot PADDING_SLOT) and attend to nothing (context length 0).
"""

import functools
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.context import Context
from nanovllm.engine.model_input import PADDING_SLOT, ModelInput
from nanovllm.progress import Progress
from nanovllm.worker.torch_state import gpu_lock

MAX_GRAPH_BATCH_SIZE = 512  # larger batches keep the GPU busy longer than launching takes: they run eagerly

Forward = Callable[[torch.Tensor, torch.Tensor, Context], torch.Tensor | None]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a device are recorded. cuBLAS keeps memory for each stream that it has seen, as
    long as the process lives: 32 MiB on an H100, 224 MiB when each of five graphs had its own.
    """
    return torch.cuda.Stream(device)


def graph_batch_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that get a graph, ascending: 1, 2, 4, 8, multiples of 16, and max_num_seqs itself, as far as the
    limit.
    """
    largest = min(max_num_seqs, MAX_GRAPH_BATCH_SIZE)
    return sorted({size for size in (1, 2, 4, 8, *range(16, largest, 16)) if size < largest} | {largest})


class CUDAGraphRunner:
    """Graphs of `forward` for each of `batch_sizes`, which share one memory pool and one set of buffers.

    forward: (input_ids [B], positions [B], Context) -> logits [B, V] (None on ranks without); must not wait for the
    device, and its memory and launches must depend on B alone. max_blocks_per_seq: width of the block tables,
    max_model_len / block size rounded up. max_model_len: max_seqlen_k of the recorded Context, whatever the lengths at
    replay. Captures at construction.
    """

    def __init__(
        self,
        forward: Forward,
        batch_sizes: list[int],
        max_blocks_per_seq: int,
        max_model_len: int,
        device: torch.device,
        use_tqdm: bool = True,
    ) -> None:
        self.batch_sizes = batch_sizes
        self._max_model_len = max_model_len
        num_rows = batch_sizes[-1]
        # Host copies are pinned and filled in place, when the copy to the device that was made last is done.
        self._is_copied = torch.cuda.Event()
        self._host_rows = torch.zeros((3, num_rows), dtype=torch.int64, pin_memory=True)
        self._host_tables = torch.zeros((2 + max_blocks_per_seq, num_rows), dtype=torch.int32, pin_memory=True)
        self._host_rows[2] = PADDING_SLOT
        self._host_tables[1] = torch.arange(num_rows)
        self._rows = self._host_rows.to(device)  # input_ids, positions, slot_mapping
        self._tables = self._host_tables.to(device)  # context_lens, sequence_order, then num_rows rows of block tables
        self._cu_seqlens = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, torch.Tensor | None] = {}
        pool: Any = None
        stream = _side_stream(device)
        # The largest first: its memory serves the smaller ones.
        with Progress("Capturing CUDA graphs", len(batch_sizes), is_shown=use_tqdm) as progress:
            for size in batch_sizes[::-1]:
                graph = torch.cuda.CUDAGraph()
                inputs = self._inputs(size)
                with gpu_lock:
                    self._warm_up(forward, inputs, stream)
                    # thread_local: what the program's other threads do on the GPU does not end the capture.
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                        logits = forward(*inputs)
                pool = pool or graph.pool()
                self._graphs[size], self._logits[size] = graph, logits
                progress.update()

    @staticmethod
    def _warm_up(
        forward: Forward, inputs: tuple[torch.Tensor, torch.Tensor, Context], stream: torch.cuda.Stream
    ) -> None:
        """Compile kernels and create library handles, on another stream as torch's capture asks for."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(*inputs)
        torch.cuda.current_stream().wait_stream(stream)

    def _inputs(self, size: int) -> tuple[torch.Tensor, torch.Tensor, Context]:
        input_ids, positions, slot_mapping = self._rows[:, :size]
        context = Context(
            is_prefill=False,
            slot_mapping=slot_mapping,
            cu_seqlens_q=self._cu_seqlens[: size + 1],
            cu_seqlens_k=self._cu_seqlens[: size + 1],  # not read in decode
            max_seqlen_q=1,
            max_seqlen_k=self._max_model_len,
            context_lens=self._tables[0, :size],
            block_tables=self._tables[2:].view(self._tables.shape[1], -1)[:size],
            sequence_order=self._tables[1, :size],
        )
        return input_ids, positions, context

    def can_replay(self, model_input: ModelInput) -> bool:
        """Whether there is a graph for so many sequences."""
        return not model_input.is_prefill and len(model_input.input_ids) <= self.batch_sizes[-1]

    def replay(self, model_input: ModelInput, input_ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """What forward returned, for a decode step: logits [num_seqs, V]. The next replay overwrites them.

        input_ids: [num_seqs] int64 on the device, instead of model_input's.
        """
        num_seqs = len(model_input.input_ids)
        size = self.batch_sizes[bisect_left(self.batch_sizes, num_seqs)]
        tables = model_input.block_tables
        assert tables is not None
        self._is_copied.synchronize()
        rows, host_tables = self._host_rows.numpy(), self._host_tables.numpy()
        rows[:, :num_seqs] = model_input.input_ids, model_input.positions, model_input.slot_mapping
        rows[:2, num_seqs:] = 0
        rows[2, num_seqs:] = PADDING_SLOT
        host_tables[:2, :num_seqs] = model_input.context_lens, model_input.sequence_order
        host_tables[0, num_seqs:] = 0
        host_tables[1, num_seqs:] = range(num_seqs, host_tables.shape[1])
        block_tables = host_tables[2:].reshape(host_tables.shape[1], -1)
        block_tables[:num_seqs, : tables.shape[1]] = tables
        used = 2 * host_tables.shape[1] + size * block_tables.shape[1]
        self._rows.copy_(self._host_rows, non_blocking=True)
        self._tables.view(-1)[:used].copy_(self._host_tables.view(-1)[:used], non_blocking=True)
        self._is_copied.record()
        if input_ids is not None:
            self._rows[0, :num_seqs].copy_(input_ids)
        self._graphs[size].replay()
        logits = self._logits[size]
        return None if logits is None else logits[:num_seqs]

    def close(self) -> None:
        """Free the graphs and their memory; needed before a process group that they use is destroyed."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._logits.clear()
