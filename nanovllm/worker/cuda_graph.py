"""CUDAGraphRunner: decode as CUDA graphs, one captured forward pass per batch size.

A decode step is many small kernels, and launching them from Python takes longer than running them. A graph captures
the launches once and replays them with one call. A replay reads its inputs from fixed buffers of a fixed shape, so a
batch runs in the graph of the next larger batch size. The rows that pad the batch store nothing (slot PADDING_SLOT) and
attend to nothing (context length 0).
"""

from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanovllm.context import Context
from nanovllm.engine.model_input import PADDING_SLOT, ModelInput
from nanovllm.progress import Progress
from nanovllm.worker.torch_state import gpu_lock

MAX_GRAPH_BATCH_SIZE = 512  # larger batches run eagerly: their kernels take longer than the launches

Array = TypeVar("Array")  # np.ndarray on the host, Tensor on the device
Forward = Callable[..., Tensor]
Sample = Callable[..., Tensor]


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all graphs of a device, since cuBLAS keeps a workspace per stream until the process ends.

    On an H100 this one takes 32 MiB; one stream for each of five graphs took 224 MiB.
    """
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class CaptureOptions:
    """What the graphs of decode and of prefill are captured with.

    forward: (input_ids [T], positions [T], Context, last_tokens [B] or None) -> this rank's columns of the logits of B
        tokens. It must not wait for the device, and its allocations and launches must depend on the shapes alone.
    shortened: returns a context manager, in which forward runs fewer layers, but each of its kernels at least once.
    max_model_len: max_seqlen_k of the captured Context, whatever the lengths at a replay.
    max_blocks_per_seq: max_model_len / block size, rounded up.
    """

    forward: Forward
    shortened: Callable[[], AbstractContextManager[object]]
    max_model_len: int
    max_blocks_per_seq: int
    device: torch.device
    use_tqdm: bool


def capture(compute: Callable[[], Tensor], options: CaptureOptions, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of compute(), and the output of compute(), which each replay overwrites.

    compute() first runs once outside the capture, in options.shortened(), because a capture permits neither compiling
    kernels nor creating library handles. pool: the memory pool to use; None for a new one.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(options.device)
    with gpu_lock:
        with options.shortened():
            _warm_up(compute, stream)
        # thread_local: GPU calls of the program's other threads do not invalidate the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = compute()
    return graph, output


def _warm_up(compute: Callable[[], object], stream: torch.cuda.Stream) -> None:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)


class GraphRunner:
    """The graphs of one kind of step, and the logits of each. pool: the memory pool that the graphs share."""

    def __init__(self, pool: Any = None) -> None:
        self.pool = pool
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._logits: dict[Any, Tensor] = {}

    def _capture(self, what: str, keys: list[Any], compute: Forward, options: CaptureOptions) -> None:
        """Capture compute(key) for each key. what: the title of the progress bar."""
        with Progress(what, len(keys), is_shown=options.use_tqdm) as progress:
            for key in sorted(keys, reverse=True):  # the largest first: the smaller graphs reuse its memory
                graph, self._logits[key] = capture(partial(compute, key), options, self.pool)
                self._graphs[key], self.pool = graph, self.pool or graph.pool()
                progress.update()

    def _replay(self, key: Any, num_seqs: int) -> Tensor:
        self._graphs[key].replay()
        return self._logits[key][:num_seqs]

    def close(self) -> None:
        """Free the graphs and their memory; required before a process group that they use is destroyed."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._logits.clear()


class GraphSizes(NamedTuple):
    """Sizes that get a graph, ascending: batch sizes of decode, those with a second graph for it, tokens of prefill."""

    decode: list[int]
    shared_prefix: list[int]
    prefill: list[int]


def graph_batch_sizes(max_num_seqs: int) -> list[int]:
    """Ascending: 1, 2, 4, 8, the multiples of 16, and the largest: max_num_seqs, at most MAX_GRAPH_BATCH_SIZE."""
    largest = min(max_num_seqs, MAX_GRAPH_BATCH_SIZE)
    return sorted({size for size in (1, 2, 4, 8, *range(16, largest, 16)) if size < largest} | {largest})


def shared_prefix_batch_sizes(batch_sizes: list[int]) -> list[int]:
    """The sizes that get a second graph, which reads shared prefixes once: the multiples of 64, and the largest."""
    return [size for size in batch_sizes if size % 64 == 0 or (size == batch_sizes[-1] and size > 32)]


@dataclass(frozen=True)
class DecodeBuffers(Generic[Array]):
    """The inputs of a decode step, as views of one buffer of bytes in this order, so that one copy moves them all.

    input_ids: [capacity] int64, the tokens that the host knows.
    input_ids_source: [capacity] int64, the index of each sequence's input id in CUDAGraphRunner's table of tokens.
    positions, slot_mapping, seed_low, seed_high, sample_positions: [capacity] int64.
    context_lens, sequence_order, shared_prefix_order, shared_prefix_lens: [capacity] int32.
    temperature: [capacity] float32. takes_argmax: [capacity] bool. As in SamplingMetadata, whose position is here
        sample_positions.
    block_tables: [capacity, max_blocks_per_seq] int32; last, since a smaller batch needs its first rows only.
    """

    input_ids: Array
    input_ids_source: Array
    positions: Array
    slot_mapping: Array
    seed_low: Array
    seed_high: Array
    sample_positions: Array
    context_lens: Array
    sequence_order: Array
    shared_prefix_order: Array
    shared_prefix_lens: Array
    temperature: Array
    takes_argmax: Array
    block_tables: Array


_DTYPES = [torch.int64] * 7 + [torch.int32] * 4 + [torch.float32, torch.bool]  # of the columns before block_tables
_COLUMN_BYTES = sum(dtype.itemsize for dtype in _DTYPES)


def _round_up(capacity: int) -> int:
    """To a multiple of 16, so that each column begins at an address of a multiple of 16."""
    return -(-capacity // 16) * 16


def _views(packed: Tensor, capacity: int) -> DecodeBuffers[Tensor]:
    """The DecodeBuffers in `packed`, a uint8 tensor."""
    columns, block_tables = packed.tensor_split((_COLUMN_BYTES * capacity,))
    parts = columns.split([dtype.itemsize * capacity for dtype in _DTYPES])
    views = [part.view(dtype) for part, dtype in zip(parts, _DTYPES, strict=True)]
    return DecodeBuffers(*views, *block_tables.view(torch.int32).view(1, capacity, -1))


class CUDAGraphRunner(GraphRunner):
    """Captures a graph of options.forward and `sample` for each of sizes.decode; they share the buffers.

    A second graph for each of sizes.shared_prefix is for batches whose sequences share enough of their beginnings.
    A graph also selects the input ids, because the device may still be sampling the tokens of the step before when the
    host submits this one: a table holds the tokens that were sampled last, then those that the host has copied.

    sample: Sampler.sample_unfiltered; it must not wait for the device either.
    max_num_seqs: the largest number of tokens that a step samples.
    """

    def __init__(self, options: CaptureOptions, sample: Sample, sizes: GraphSizes, max_num_seqs: int) -> None:
        super().__init__()
        self.batch_sizes, self.shared_prefix_sizes = sizes.decode, sizes.shared_prefix
        capacity, num_sampled = _round_up(sizes.decode[-1]), _round_up(max_num_seqs)
        num_bytes = capacity * (_COLUMN_BYTES + options.max_blocks_per_seq * 4)
        self._packed_on_host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        views = _views(self._packed_on_host, capacity)
        self._host = DecodeBuffers(*(view.numpy() for view in vars(views).values()))
        self._host.slot_mapping[:] = PADDING_SLOT
        self._copy_done = torch.cuda.Event()  # then the host buffers may be filled again
        num_sampled_bytes = num_sampled * torch.int64.itemsize
        on_device = torch.zeros(num_sampled_bytes + num_bytes, dtype=torch.uint8, device=options.device)
        self._packed = on_device[num_sampled_bytes:]
        self._buffers = _views(self._packed, capacity)
        self._tokens = on_device[: num_sampled_bytes + capacity * torch.int64.itemsize].view(torch.int64)
        self.sampled = self._tokens[:num_sampled]  # of the last step
        self._own_tokens = np.arange(num_sampled, len(self._tokens))  # indices of self._buffers.input_ids
        self._cu_seqlens = torch.arange(capacity + 1, dtype=torch.int32, device=options.device)
        keys = [(size, False) for size in sizes.decode] + [(size, True) for size in sizes.shared_prefix]
        self._capture("Capturing CUDA graphs", keys, partial(self._compute, options, sample), options)

    def _compute(self, options: CaptureOptions, sample: Sample, key: tuple[int, bool]) -> Tensor:
        """The logits; writes the tokens to self.sampled. key: (batch size, whether shared prefixes are read once)."""
        (size, shares_prefix), buffers = key, self._buffers
        context = Context(
            is_prefill=False,
            slot_mapping=buffers.slot_mapping[:size],
            cu_seqlens_q=self._cu_seqlens[: size + 1],
            cu_seqlens_k=self._cu_seqlens[: size + 1],  # not read in decode
            max_seqlen_q=1,
            max_seqlen_k=options.max_model_len,
            context_lens=buffers.context_lens[:size],
            block_tables=buffers.block_tables[:size],
            sequence_order=buffers.sequence_order[:size],
            shared_prefix_order=buffers.shared_prefix_order[:size] if shares_prefix else None,
            shared_prefix_lens=buffers.shared_prefix_lens[:size] if shares_prefix else None,
        )
        input_ids = self._tokens.index_select(0, buffers.input_ids_source[:size])
        logits = options.forward(input_ids, buffers.positions[:size], context)
        columns = (
            buffers.temperature,
            buffers.seed_low,
            buffers.seed_high,
            buffers.sample_positions,
            buffers.takes_argmax,
        )
        self.sampled[:size].copy_(sample(logits, *(column[:size] for column in columns)))
        return logits

    def can_replay(self, model_input: ModelInput) -> bool:
        """Whether model_input is a decode step that fits into a graph."""
        return not model_input.is_prefill and len(model_input.input_ids) <= self.batch_sizes[-1]

    def replay(self, model_input: ModelInput, previous_token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """This rank's columns of the logits, [num_seqs, V/size], and token ids [num_seqs] int64 of a decode step.

        The next replay overwrites both. For filtered rows (top-k, top-p, min-p) the token id is the argmax.

        previous_token_ids: those of the step before, which model_input.input_ids_source refers to.
        """
        num_seqs = len(model_input.input_ids)
        shares_prefix = model_input.shared_prefixes is not None and num_seqs <= max(self.shared_prefix_sizes, default=0)
        sizes = self.shared_prefix_sizes if shares_prefix else self.batch_sizes
        size = sizes[bisect_left(sizes, num_seqs)]
        if model_input.input_ids_source is not None:
            assert previous_token_ids is not None
            if previous_token_ids.data_ptr() != self.sampled.data_ptr():  # the step before had no graph
                self.sampled[: len(previous_token_ids)].copy_(previous_token_ids)
        self._copy_done.synchronize()
        self._fill(model_input, size)
        num_bytes = self._packed.nbytes - self._host.block_tables[size:].nbytes
        self._packed[:num_bytes].copy_(self._packed_on_host[:num_bytes], non_blocking=True)
        self._copy_done.record()
        return self._replay((size, shares_prefix), num_seqs), self.sampled[:num_seqs]

    def _fill(self, model_input: ModelInput, size: int) -> None:
        """Write the first `size` rows of the buffers on the host."""
        host, sampling, block_tables = self._host, model_input.sampling, model_input.block_tables
        num_seqs, source = len(model_input.input_ids), model_input.input_ids_source
        padding_rows = np.arange(num_seqs, size)

        def fill(column: np.ndarray, values: np.ndarray, padding: int | np.ndarray) -> None:
            column[:num_seqs] = values
            if size > num_seqs:
                column[num_seqs:size] = padding

        fill(host.input_ids, model_input.input_ids, padding=0)
        host.input_ids_source[:size] = self._own_tokens[:size]
        if source is not None:
            np.copyto(host.input_ids_source[:num_seqs], source, where=source >= 0)
        fill(host.positions, model_input.positions, padding=0)
        fill(host.slot_mapping, model_input.slot_mapping, padding=PADDING_SLOT)
        fill(host.seed_low, sampling.seed_low, padding=0)
        fill(host.seed_high, sampling.seed_high, padding=0)
        fill(host.sample_positions, sampling.position, padding=0)
        fill(host.context_lens, model_input.context_lens, padding=0)
        fill(host.sequence_order, model_input.sequence_order, padding=padding_rows)
        if model_input.shared_prefixes is not None:
            fill(host.shared_prefix_order, model_input.shared_prefixes.order, padding=padding_rows)
            fill(host.shared_prefix_lens, model_input.shared_prefixes.lens, padding=0)
        fill(host.temperature, sampling.temperature, padding=1)
        fill(host.takes_argmax, sampling.takes_argmax, padding=True)
        host.block_tables[:num_seqs, : block_tables.shape[1]] = block_tables
