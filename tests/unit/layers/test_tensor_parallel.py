"""TensorParallel over real processes, and the arithmetic of shares."""

import pytest
import torch.multiprocessing as multiprocessing

from nanovllm.layers.tensor_parallel import TensorParallel
from tests.parallel_ranks import run_in_gloo_process


def test_ranks_sum_and_gather_in_rank_order(tmp_path):
    """D37: rows of a batch stay rows; rank r's columns stand at place r. D30: the minimum is every rank's."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.spawn(run_in_gloo_process, (2, str(tmp_path / "rendezvous"), results), nprocs=2)
    by_rank = {rank: said for rank, *said in (results.get(), results.get())}
    total = [[10.0, 12.0, 14.0], [16.0, 18.0, 20.0]]
    assert by_rank[0] == [total, [[0.0, 1.0, 2.0, 10.0, 11.0, 12.0], [3.0, 4.0, 5.0, 13.0, 14.0, 15.0]], 6]
    assert by_rank[1] == [total, None, 6]


def test_share_that_is_no_integer_is_refused_by_name():
    with pytest.raises(ValueError, match="vocab_size must be divisible by the tensor-parallel size 4, got 10"):
        TensorParallel(0, 4).share("vocab_size", 10)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_rank_outside_the_group_is_refused(rank, size):
    with pytest.raises(ValueError, match="rank must be from 0 to size - 1"):
        TensorParallel(rank, size)
