"""NCCL groups of one machine are made where torch's own watching is off, and others are not."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from nanovllm.worker import meeting
from nanovllm.worker.process_group import Place

NAME = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


@pytest.mark.parametrize("before", [None, "3"])
def test_torch_does_not_end_the_process_for_a_rank_that_has_gone(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """D33: rank 0 says what happened, and goes on. Other groups of the program are as they were, though engines start
    in several threads at once.
    """
    if before is None:
        monkeypatch.delenv(NAME, raising=False)
    else:
        monkeypatch.setenv(NAME, before)

    def make_group(place: Place, store: object) -> str:
        time.sleep(0.05)
        return os.environ[NAME]

    def start_an_engine(number: int) -> str:
        time.sleep(0.02 * number)
        return meeting.meet(Place(0, 1, num_sharing=1, gpu=0), dist.HashStore())

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(meeting, "nccl", make_group)
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(start_an_engine, range(3))) == ["0"] * 3
    assert os.environ.get(NAME) == before
