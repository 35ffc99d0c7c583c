"""What CUDAGraphRunner puts into its buffers, without a GPU: here a graph is a function that is called again.

The recorded forward pass computes, row by row, a number from everything it is given. So a replay must give what the
function gives for the batch's own integers; rows that pad must be the neutral ones; and nothing of an earlier, wider
batch may show. That real graphs do the same is for tests/e2e/test_gpu_graphs.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm.context import Context
from nanovllm.engine.model_input import PADDING_BLOCK, PADDING_SLOT, ModelInput, prepare_decode, prepare_decode_async
from nanovllm.engine.sequence import Sequence
from nanovllm.worker import cuda_graph
from nanovllm.worker.cuda_graph import CUDAGraphRunner
from tests.support.counts import count_comparisons
from tests.support.scheduling import make_sequence

BATCH_SIZES = [1, 2, 4, 7]
BLOCK_SIZE = 4
MAX_BLOCKS = 5


class Recording:
    """Stands for torch.cuda.CUDAGraph: replay() computes again, into the same tensor."""

    current: "Recording | None" = None
    replayed: "Recording | None" = None

    def __init__(self) -> None:
        self.is_reset = False

    def record(self, inputs: Any, logits: torch.Tensor) -> None:
        self.inputs, self.logits = inputs, logits

    def replay(self) -> None:
        assert not self.is_reset
        Recording.replayed = self
        self.logits.copy_(rows_of(*self.inputs))

    def pool(self) -> str:
        return "the pool of the largest"

    def reset(self) -> None:
        self.is_reset = True


def rows_of(input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
    """[B, 8 + MAX_BLOCKS] int64: all that belongs to each row, and whether the rest is as it must be."""
    assert context.block_tables is not None
    assert not context.is_prefill
    num_rows = len(input_ids)
    order = torch.argsort(context.sequence_order.long())  # so that each row once gives 0, 1, 2, ...
    columns = torch.arange(MAX_BLOCKS)
    num_blocks = -(-context.context_lens[:, None] // BLOCK_SIZE)
    tables = torch.where(columns < num_blocks, context.block_tables, PADDING_BLOCK)
    facts = [
        input_ids, positions, context.slot_mapping, context.context_lens, context.sequence_order[order],
        torch.full((num_rows,), context.max_seqlen_q), torch.full((num_rows,), context.max_seqlen_k),
        context.cu_seqlens_q[1:] - context.cu_seqlens_q[:-1],
    ]  # fmt: skip
    return torch.cat([torch.stack([fact.long() for fact in facts], dim=1), tables.long()], dim=1)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recording, Any]]:
    """Each graph, in the order of recording, with the pool it was recorded into."""
    made: list[tuple[Recording, Any]] = []

    @contextmanager
    def recording(graph: Recording, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (stream, capture_error_mode) == ("the side stream of cpu", "thread_local")
        made.append((graph, pool))
        Recording.current = graph
        yield
        Recording.current = None

    class Event:
        def synchronize(self) -> None: ...
        def record(self) -> None: ...

    zeros, to = torch.zeros, torch.Tensor.to
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: to(self, *args).clone())  # a device's own memory
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(CUDAGraphRunner, "_warm_up", staticmethod(lambda forward, inputs, stream: None))
    monkeypatch.setattr(cuda_graph, "_side_stream", "the side stream of {}".format)
    return made


def forward(input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
    logits = rows_of(input_ids, positions, context)
    if Recording.current is not None:
        Recording.current.record((input_ids, positions, context), logits)
    return logits


def make_graphs() -> CUDAGraphRunner:
    return CUDAGraphRunner(
        forward, BATCH_SIZES, MAX_BLOCKS, MAX_BLOCKS * BLOCK_SIZE, torch.device("cpu"), use_tqdm=False
    )


def decoding(num_seqs: int, offset: int = 0) -> list[Sequence]:
    """Of different lengths, in no order, with blocks of their own; block 0 among them."""
    sequences = []
    for index in range(num_seqs):
        length = 1 + (7 * (index + offset)) % (MAX_BLOCKS * BLOCK_SIZE)
        seq = make_sequence([100 * index + position + offset for position in range(length)], BLOCK_SIZE)
        seq.block_table = [MAX_BLOCKS * index + block for block in range(seq.num_blocks)]
        seq.num_cached_tokens = seq.num_tokens_with_kv = length - 1
        seq.num_scheduled_tokens = 1
        sequences.append(seq)
    return sequences


def expected(model_input: ModelInput) -> torch.Tensor:
    """rows_of the batch alone, and of nothing else."""
    num_rows = len(model_input.input_ids)
    tables = torch.full((num_rows, MAX_BLOCKS), PADDING_BLOCK)
    assert model_input.block_tables is not None
    tables[:, : model_input.block_tables.shape[1]] = torch.from_numpy(model_input.block_tables)
    context = Context(
        is_prefill=False,
        slot_mapping=torch.from_numpy(model_input.slot_mapping),
        cu_seqlens_q=torch.from_numpy(model_input.cu_seqlens_q),
        cu_seqlens_k=torch.from_numpy(model_input.cu_seqlens_k),
        max_seqlen_q=1,
        max_seqlen_k=MAX_BLOCKS * BLOCK_SIZE,
        context_lens=torch.from_numpy(model_input.context_lens),
        block_tables=tables,
        sequence_order=torch.from_numpy(model_input.sequence_order),
    )
    return rows_of(torch.from_numpy(model_input.input_ids), torch.from_numpy(model_input.positions), context)


@pytest.mark.usefixtures("recordings")
def test_each_batch_sees_its_own_integers_and_neutral_padding() -> None:
    """D40 D41 D57: wide, narrow, wide again; sizes with a graph, and those between."""
    graphs = make_graphs()
    for step, size in enumerate([*range(7, 0, -1), *range(1, 8), 1, 6, 2, 5]):
        model_input = prepare_decode(decoding(size, offset=step))
        assert graphs.can_replay(model_input)
        logits = graphs.replay(model_input)
        assert logits is not None
        assert torch.equal(logits, expected(model_input))
        count_comparisons("graph buffers against the batch's integers", logits.numel())
        num_rows = next(each for each in BATCH_SIZES if each >= size)
        assert Recording.replayed is not None
        input_ids, positions, context = Recording.replayed.inputs
        assert len(input_ids) == num_rows, "the smallest graph that holds it"
        assert context.slot_mapping[size:].tolist() == [PADDING_SLOT] * (num_rows - size), "stores nothing"
        assert context.context_lens[size:].tolist() == [0] * (num_rows - size), "reads nothing"
        assert sorted(context.sequence_order.tolist()) == list(range(num_rows)), "each row is computed once"
        assert input_ids[size:].tolist() == positions[size:].tolist() == [0] * (num_rows - size)


@pytest.mark.usefixtures("recordings")
def test_tokens_that_the_host_does_not_know_come_from_the_device() -> None:
    graphs = make_graphs()
    sequences = decoding(3)
    for seq in sequences:
        seq.block_table.append(50)  # should the next token open a block
    model_input = prepare_decode_async(sequences, sequences)
    logits = graphs.replay(model_input, torch.tensor([7, 8, 9]))
    assert logits is not None
    assert logits[:, 0].tolist() == [7, 8, 9]
    assert torch.equal(logits[:, 1:], expected(model_input)[:, 1:])


def test_the_largest_is_recorded_first_and_all_share_its_memory(recordings: list[tuple[Recording, Any]]) -> None:
    """D42."""
    make_graphs()
    assert [len(graph.inputs[0]) for graph, _ in recordings] == BATCH_SIZES[::-1]
    assert [pool for _, pool in recordings] == [None, *["the pool of the largest"] * 3]


@pytest.mark.usefixtures("recordings")
def test_prefills_and_larger_batches_run_without() -> None:
    graphs = make_graphs()
    assert not graphs.can_replay(prepare_decode(decoding(8)))
    assert not graphs.can_replay(replace(prepare_decode(decoding(2)), is_prefill=True))


def test_close_frees_them_all(recordings: list[tuple[Recording, Any]]) -> None:
    """D35."""
    graphs = make_graphs()
    graphs.close()
    assert all(graph.is_reset for graph, _ in recordings)
    assert len(recordings) == len(BATCH_SIZES)
