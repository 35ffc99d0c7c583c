"""PrefillGraphRunner without a GPU: which prefills have a graph, and a padded one computes what an eager one does."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.engine.model_input import ModelInput, prepare_decode, prepare_prefill
from nanovllm.engine.sequence import Sequence
from nanovllm.worker.cuda_graph import GraphSizes
from nanovllm.worker.prefill_graph import MAX_GRAPH_SEQS, prefill_graph_sizes
from tests.support.counts import count_comparisons
from tests.support.model_probe import make_runner
from tests.support.tiny_models import tiny_model
from tests.unit.worker.conftest import Captures

BLOCK_SIZE = 4
MAX_LEN = 40
NUM_BLOCKS = MAX_GRAPH_SEQS * MAX_LEN // BLOCK_SIZE


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "parameters_per_layer", "sizes"),
    [
        (1, 1e6, [64]),
        (64, 1e6, [64]),
        (65, 1e6, [64, 128]),
        (700, 1e6, [64, 128, 256, 512, 768]),
        (16384, 1e6, [64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096]),
        (16384, 2.27e8, [64, 128, 256, 512, 768]),  # Llama 3 8B
        (300, 2.27e8, [64, 128, 256, 512]),
        (16384, 1e10, []),
    ],
)
def test_sizes_by_hand(max_num_batched_tokens: int, parameters_per_layer: float, sizes: list[int]) -> None:
    assert prefill_graph_sizes(max_num_batched_tokens, parameters_per_layer) == sizes


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])  # so made before `captures` takes the place of GPUs
def model_dir(request: pytest.FixtureRequest) -> Path:
    return tiny_model(request.param, dtype="float64")


@pytest.fixture
def runner(model_dir: Path, captures: Captures) -> Iterator[Any]:
    """Graphs of 16 and 32 tokens. The first logits of each are NaN, as is the whole cache but what a step stores."""
    runner: Any = make_runner(
        model_dir, device="cpu", attention_backend="torch", max_model_len=MAX_LEN,
        max_num_seqs=64, kv_cache_block_size=BLOCK_SIZE, num_kv_cache_blocks=NUM_BLOCKS,
    )  # fmt: skip
    runner.capture_graphs(GraphSizes(decode=[1], shared_prefix=[], prefill=[16, 32]), use_tqdm=False)
    assert [pool for _, pool in captures] == [None, *["the pool of the largest"] * 2], "that of the graph of decode"
    yield runner
    runner.close()


def prefilling(query_lens: list[int], cached_lens: list[int], left: int = 0) -> list[Sequence]:
    """Sequences in blocks of their own, in no order. left: tokens of the first one that this step leaves for later."""
    blocks = list(range(NUM_BLOCKS))
    random.Random(len(query_lens)).shuffle(blocks)
    sequences = []
    for index, (query_len, cached_len) in enumerate(zip(query_lens, cached_lens, strict=True)):
        num_tokens = cached_len + query_len + (left if index == 0 else 0)
        seq = Sequence([(7 * index + 3 * place) % 50 for place in range(num_tokens)], block_size=BLOCK_SIZE, seed=index)
        seq.block_table = [blocks.pop() for _ in range(seq.num_blocks)]
        seq.num_cached_tokens = seq.num_tokens_with_kv = cached_len
        seq.num_scheduled_tokens = query_len
        sequences.append(seq)
    return sequences


@torch.inference_mode()
def computed(runner: Any, cache: torch.Tensor, model_input: ModelInput) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The logits of a step that begins with `cache`, and the cache that it leaves."""
    runner.kv_cache.copy_(cache)
    logits = runner._compute_logits(model_input, None)
    return logits, runner.kv_cache.clone()


STEPS = {
    "one short prompt": ([3], [0], 0),
    "a whole graph": ([20, 12], [0, 0], 0),
    "one token more than the smaller graph": ([9, 8], [0, 0], 0),
    "behind cached tokens": ([1, 5, 2], [8, 3, 30], 0),
    "new and cached ones": ([6, 2, 7], [0, 21, 0], 0),
    "as many sequences as fit": ([1] * MAX_GRAPH_SEQS, [*range(MAX_GRAPH_SEQS)], 0),
    "a chunk, which samples nothing": ([7], [4], 5),
    "a chunk before one that is sampled": ([7, 4], [0, 0], 5),
}


def test_a_padded_prefill_computes_what_an_eager_one_does(runner: Any) -> None:
    """In one engine, so that buffers hold what wider and narrower steps left in them.

    In float64, where another number of rows changes the order of sums by much less than torch.testing tolerates.
    """
    graphs = runner.prefill_graphs
    for name, (query_lens, cached_lens, left) in [*STEPS.items(), *reversed(STEPS.items())]:
        described = f"{name}: {{}}".format
        sequences = prefilling(query_lens, cached_lens, left)
        model_input = prepare_prefill(sequences)
        assert graphs.can_replay(model_input), name
        cache = torch.full_like(runner.kv_cache, torch.nan)
        for seq in sequences:
            for place in range(seq.num_cached_tokens):
                cache[:, :, seq.block_table[place // BLOCK_SIZE], place % BLOCK_SIZE] = place / 50
        runner.prefill_graphs = None
        logits, expected_cache = computed(runner, cache, model_input)
        runner.prefill_graphs = graphs
        padded_logits, padded_cache = computed(runner, cache, model_input)
        torch.testing.assert_close(padded_cache, expected_cache, equal_nan=True, msg=described)
        if left and len(query_lens) == 1:
            assert padded_logits is logits is None
            continue
        assert logits is not None
        assert padded_logits is not None
        torch.testing.assert_close(padded_logits, logits, msg=described)
        count_comparisons("prefill graphs against eager prefill: rows of logits", len(logits))


def test_other_steps_have_no_graph(runner: Any) -> None:
    """More tokens, more sequences, decode."""
    graphs = runner.prefill_graphs
    assert not graphs.can_replay(prepare_prefill(prefilling([33], [0])))
    assert not graphs.can_replay(prepare_prefill(prefilling([1] * (MAX_GRAPH_SEQS + 1), [0] * (MAX_GRAPH_SEQS + 1))))
    assert not graphs.can_replay(prepare_decode(prefilling([1], [3])))


def test_close_frees_all_graphs(captures: Captures, runner: Any) -> None:
    """D35."""
    runner.close()
    assert runner.prefill_graphs is None
    for graph, _ in captures:
        graph.reset.assert_called_once()
    runner.model = runner.kv_cache = None  # for the fixture's own close()
