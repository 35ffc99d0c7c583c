"""Which batch sizes get a graph."""

import itertools

import pytest

from nanovllm.worker.cuda_graph import MAX_GRAPH_BATCH_SIZE, graph_batch_sizes


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 9]),
        (17, [1, 2, 4, 8, 16, 17]),
        (33, [1, 2, 4, 8, 16, 32, 33]),
    ],
)
def test_sizes_by_hand(max_num_seqs: int, sizes: list[int]) -> None:
    assert graph_batch_sizes(max_num_seqs) == sizes


@pytest.mark.parametrize("max_num_seqs", range(1, 1100, 7))
def test_every_batch_size_has_a_graph_or_is_above_the_limit(max_num_seqs: int) -> None:
    """D40: 472 of the 512 values of max_num_seqs once had batches without one."""
    sizes = graph_batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, MAX_GRAPH_BATCH_SIZE)
    assert all(larger - smaller <= 16 for smaller, larger in itertools.pairwise(sizes))
