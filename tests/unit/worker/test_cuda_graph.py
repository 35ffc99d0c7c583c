"""CUDAGraphRunner without a GPU: which batch sizes get a graph, and what its buffers hold when a graph is replayed."""

import itertools
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.context import Context
from nanovllm.engine.model_input import PADDING_SLOT, ModelInput, prepare_decode, prepare_decode_async
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.shared_prefix import SharedPrefixes
from nanovllm.executor.base import free_frames
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.worker import cuda_graph
from nanovllm.worker.cuda_graph import (
    MAX_GRAPH_BATCH_SIZE,
    CaptureOptions,
    CUDAGraphRunner,
    GraphSizes,
    graph_batch_sizes,
)
from tests.support.counts import count_comparisons
from tests.support.model_probe import make_runner
from tests.support.scheduling import make_sequence
from tests.support.tiny_models import tiny_model
from tests.unit.worker.conftest import Captures

BATCH_SIZES = [1, 2, 4, 7]
SIZES = GraphSizes(decode=BATCH_SIZES, shared_prefix=[4], prefill=[])
BLOCK_SIZE = 4
MAX_BLOCKS = 5
MAX_NUM_SEQS = 9


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (9, [1, 2, 4, 8, 9]), (17, [1, 2, 4, 8, 16, 17]), (32, [1, 2, 4, 8, 16, 32])],
)
def test_sizes_by_hand(max_num_seqs: int, sizes: list[int]) -> None:
    assert graph_batch_sizes(max_num_seqs) == sizes


def test_every_batch_size_has_a_graph_or_is_above_the_limit() -> None:
    """D40: 472 of the 512 values of max_num_seqs once had batches without one."""
    for max_num_seqs in range(1, 1100):
        sizes = graph_batch_sizes(max_num_seqs)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == min(max_num_seqs, MAX_GRAPH_BATCH_SIZE)
        assert all(larger - smaller <= 16 for smaller, larger in itertools.pairwise(sizes))


Inputs = list[tuple[torch.Tensor, torch.Tensor, Context]]


@pytest.fixture
def inputs() -> Inputs:
    """(input_ids, positions, context) of each forward pass, the captured ones first."""
    return []


@pytest.fixture
def runner(captures: Captures, inputs: Inputs) -> CUDAGraphRunner:
    """Its logits are twice the token ids. Its sampled tokens are the sum of all that sampling depends on."""

    def forward(input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        inputs.append((input_ids, positions, context))
        return 2 * input_ids[:, None]

    options = CaptureOptions(
        forward, nullcontext, MAX_BLOCKS * BLOCK_SIZE, MAX_BLOCKS, torch.device("cpu"), use_tqdm=False
    )
    return CUDAGraphRunner(options, sample, SIZES, MAX_NUM_SEQS)


def sample(logits: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    weights = (10_000, 1_000, 1, 100, 100_000)
    total = sum(weight * column for weight, column in zip(weights, columns, strict=True))
    return (logits[:, 0] + total).to(torch.int64)


def sampled_by_hand(model_input: ModelInput) -> list[int]:
    rows = model_input.sampling
    columns = (rows.temperature, rows.seed_low, rows.seed_high, rows.position, rows.takes_argmax)
    logits = torch.from_numpy(2 * model_input.input_ids[:, None])
    return sample(logits, *(torch.from_numpy(column) for column in columns)).tolist()


def decoding(num_seqs: int, offset: int = 0) -> list[Sequence]:
    """Sequences of different lengths, in no order, with blocks of their own; block 0 among them."""
    sequences = []
    for index in range(num_seqs):
        length = 1 + (7 * (index + offset)) % (MAX_BLOCKS * BLOCK_SIZE)
        seq = make_sequence([100 * index + position + offset for position in range(length)], BLOCK_SIZE)
        seq.block_table = [MAX_BLOCKS * index + block for block in range(seq.num_blocks)]
        seq.num_cached_tokens = seq.num_tokens_with_kv = length - 1
        seq.num_scheduled_tokens = 1
        sequences.append(seq)
    return sequences


def decoding_async(sequences: list[Sequence], sampled: list[Sequence]) -> ModelInput:
    for seq in sequences:
        seq.block_table.append(50)  # for the next token, if it is the first of a block
    return prepare_decode_async(sequences, sampled)


def replayed(runner: CUDAGraphRunner, model_input: ModelInput, *previous: torch.Tensor) -> tuple[list[Any], list[int]]:
    logits, token_ids = runner.replay(model_input, *previous)
    return logits.tolist(), token_ids.tolist()


def test_each_batch_sees_its_own_numbers_and_neutral_padding(inputs: Inputs, runner: CUDAGraphRunner) -> None:
    """D40, D41, D57: wide, narrow, wide again; batch sizes with a graph, and those between."""
    for step, num_seqs in enumerate([*range(7, 0, -1), *range(1, 8), 1, 6, 2, 5]):
        sequences = decoding(num_seqs, offset=step)
        model_input = prepare_decode(sequences)
        assert runner.can_replay(model_input)
        logits, token_ids = replayed(runner, model_input)
        assert logits == [[2 * token_id] for token_id in model_input.input_ids]
        assert token_ids == sampled_by_hand(model_input)

        input_ids, positions, context = inputs[-1]
        size = next(each for each in BATCH_SIZES if each >= num_seqs)
        num_padding = size - num_seqs
        assert input_ids.tolist() == [*model_input.input_ids, *[0] * num_padding], "the smallest graph that holds it"
        assert positions.tolist() == [*model_input.positions, *[0] * num_padding]
        assert context.slot_mapping.tolist() == [*model_input.slot_mapping, *[PADDING_SLOT] * num_padding]
        assert context.context_lens.tolist() == [*model_input.context_lens, *[0] * num_padding]
        assert context.sequence_order.tolist() == [*model_input.sequence_order, *range(num_seqs, size)]
        assert context.cu_seqlens_q.tolist() == list(range(size + 1))
        assert (context.is_prefill, context.max_seqlen_q, context.max_seqlen_k) == (False, 1, MAX_BLOCKS * BLOCK_SIZE)
        assert context.block_tables.shape == (size, MAX_BLOCKS)
        for seq, table in zip(sequences, context.block_tables.tolist(), strict=False):
            assert table[: len(seq.block_table)] == seq.block_table
        count_comparisons("graph buffers against the batch's numbers", 6 * size + len(context.block_tables))


@pytest.mark.parametrize("previous", [torch.tensor([7, 8, 9]), torch.arange(7, 7 + MAX_NUM_SEQS)], ids=len)
def test_tokens_that_the_host_does_not_know_come_from_a_step_without_a_graph(
    inputs: Inputs, runner: CUDAGraphRunner, previous: torch.Tensor
) -> None:
    """Also if that step sampled more tokens than a graph takes."""
    sequences = decoding(3)
    logits, _ = replayed(runner, decoding_async(sequences, sequences), previous)
    assert logits == [[14], [16], [18]]
    assert inputs[-1][1].tolist() == [len(seq) for seq in sequences] + [0]


def test_tokens_that_the_host_does_not_know_come_from_the_graph_before(runner: CUDAGraphRunner) -> None:
    """Sequences leave the batch, so rows move; the last one was not in the step before."""
    first, gone, last, new = decoding(4)
    _, previous = runner.replay(prepare_decode([first, gone, last]))
    sampled = previous.tolist()
    expected = [[2 * sampled[2]], [2 * sampled[0]], [2 * new.last_token]]
    assert replayed(runner, decoding_async([last, first, new], [first, gone, last]), previous)[0] == expected


@pytest.mark.usefixtures("runner")
def test_the_largest_is_captured_first_and_all_share_its_memory(captures: Captures, inputs: Inputs) -> None:
    """D42."""
    assert [len(input_ids) for input_ids, _, _ in inputs] == [7, 4, 4, 2, 1]
    assert [pool for _, pool in captures] == [None, *["the pool of the largest"] * 4]


@pytest.mark.parametrize("num_seqs", [2, 4, 6])
def test_a_shared_prefix_takes_the_graph_that_reads_it_once(
    inputs: Inputs, runner: CUDAGraphRunner, num_seqs: int
) -> None:
    """Six sequences are more than that graph holds."""
    model_input = prepare_decode(decoding(num_seqs))
    rows = np.arange(num_seqs, dtype=np.int32)
    shared = SharedPrefixes(order=rows[::-1], lens=rows + 4)
    logits, _ = replayed(runner, replace(model_input, shared_prefixes=shared))
    assert logits == [[2 * token_id] for token_id in model_input.input_ids]
    context = inputs[-1][2]
    if num_seqs == 6:
        assert context.shared_prefix_order is None
    else:
        assert context.shared_prefix_order.tolist() == [*rows[::-1], *range(num_seqs, 4)]
        assert context.shared_prefix_lens.tolist() == [*(rows + 4), *[0] * (4 - num_seqs)]
    runner.replay(model_input)
    assert inputs[-1][2].shared_prefix_order is None


def test_prefills_and_larger_batches_have_no_graph(runner: CUDAGraphRunner) -> None:
    assert not runner.can_replay(prepare_decode(decoding(8)))
    assert not runner.can_replay(replace(prepare_decode(decoding(2)), is_prefill=True))


@pytest.fixture(scope="module")  # so made before `captures` takes the place of GPUs
def model_dir() -> Path:
    return tiny_model("llama")


@pytest.mark.parametrize("during", ["warm-up", "capture"])
def test_an_error_keeps_nothing_of_the_model(
    model_dir: Path, captures: Captures, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """D33: a traceback keeps the closures of its functions, so none of them may refer to the model."""

    def fail(self: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("planted")

    runner = make_runner(model_dir, device="cpu", attention_backend="torch", num_kv_cache_blocks=1)
    model = weakref.ref(runner.model)
    monkeypatch.setattr(RowParallelLinear, "forward", fail)
    if during == "warm-up":
        monkeypatch.setattr(cuda_graph, "_warm_up", lambda compute, stream: compute())
    with pytest.raises(RuntimeError, match="planted") as failure:
        runner.capture_graphs(GraphSizes([1], [], []), use_tqdm=False)
    del runner
    free_frames(failure.value)
    assert model() is None
    assert len(captures) == (during == "capture")
