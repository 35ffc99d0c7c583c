"""all_reduce with ranks that run against each other: interpreted, in processes whose buffers are shared memory."""

import os
import random
import time
from pathlib import Path

import pytest
import torch

from reference.tensor_parallel import all_reduce as reference_all_reduce
from tests.kernels.all_reduce_cases import empty_buffers, peer_buffers
from tests.support.kernels.versions import INTERPRETER_REASON, interprets
from tests.support.limits import HANG_SECONDS

SHAPES = [(1, 16), (5, 533), (2, 1024), (1, 1)]  # float32: from one program to eleven, so that their counts differ
NUM_LAUNCHES = 16
MAX_DELAY_S = 0.02  # a launch takes about as long


def inputs(launch: int, num_ranks: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(launch)
    shape = SHAPES[random.Random(launch).randrange(len(SHAPES))]
    return [torch.randn(shape, generator=generator) for _ in range(num_ranks)]


def run_rank(rank: int, buffers: list[torch.Tensor], folder: Path) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from nanovllm.kernels.all_reduce import all_reduce

    torch.set_num_threads(1)
    peers, delays = peer_buffers(rank, buffers), random.Random(rank)
    totals = []
    for launch in range(NUM_LAUNCHES):
        if delays.random() < 0.5:
            time.sleep(delays.random() * MAX_DELAY_S)
        totals.append(all_reduce(inputs(launch, len(buffers))[rank], peers))
    torch.save(totals, folder / f"{rank}.pt")


@pytest.mark.skipif(not interprets(), reason=INTERPRETER_REASON)
def test_ranks_that_meet_at_different_times_get_the_same_sums(tmp_path: Path) -> None:
    """A slot that was read too early, emptied too late or used twice would give another sum, or none."""
    num_ranks = 3
    buffers = [buffer.share_memory_() for buffer in empty_buffers(num_ranks, "cpu")]
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, buffers, tmp_path)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(HANG_SECONDS)
        process.kill()
    totals = [torch.load(tmp_path / f"{rank}.pt") for rank in range(num_ranks)]
    for launch in range(NUM_LAUNCHES):
        expected = reference_all_reduce(inputs(launch, num_ranks))
        for rank in range(num_ranks):
            torch.testing.assert_close(totals[rank][launch], expected, msg=lambda text, rank=rank: f"{rank=} {text}")
            assert torch.equal(totals[rank][launch], totals[0][launch]), "the ranks' bits differ"
    assert all((buffer == empty_buffers(1, "cpu")[0][0, 0, 0, 0]).all() for buffer in buffers), "something was left"
