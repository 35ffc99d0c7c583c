"""A rank that fails: rank 0 names it and the cause, and nothing is left behind. On the CPU, over gloo.

The promise is a time, ten seconds from a rank's failure to the error, so these tests look at the clock. Most take about
one second and the slowest three, besides the start of eight ranks: the limit is for a hang, not for a slow machine.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, bundled_model_path
from nanovllm.distributed import rendezvous
from nanovllm.distributed.rendezvous import ADDRESS_TIMEOUT_S, CONNECT_TIMEOUT_S
from nanovllm.executor.failure_monitor import FAILURE_COLLECT_S
from nanovllm.executor.multi_rank import ROOT_CAUSE_TIMEOUT_S
from nanovllm.executor.multiproc import CHECK_INTERVAL_S
from tests.support.rank_engines import MAX_SECONDS, OPTIONS, check_failure, engine, generate
from tests.support.rank_faults import CONNECTED, CONNECTING, Fault
from tests.support.resource_snapshot import Watch
from tests.support.tiny_models import tiny_model

CLOSED = "this engine is closed: make a new one"


@pytest.fixture(scope="module")
def model_of_eight_heads() -> Path:
    return tiny_model("llama", num_heads=8)  # made before nothing_left looks


@pytest.mark.parametrize(
    ("rank", "place", "what"),
    [
        (1, "joining", "raise"),
        *((1, place, "kill") for place in ("joining", CONNECTING, "load", "sizing", "prefill")),
        *((rank, "load", "host memory") for rank in (0, 1)),
        *((rank, "sizing", "device memory") for rank in (0, 1)),
        (1, "decode", "device memory"),
    ],
)
def test_rank_0_raises_which_rank_failed_and_why(
    nothing_left: Watch, monkeypatch: pytest.MonkeyPatch, log: Path, rank: int, place: str, what: str
) -> None:
    """D33: an error of rank 0 is raised as it is. The next tests have a rank that is killed while it decodes, and an
    error of rank 0 there; test_campaign.py has every place with every fault, among four ranks.
    """
    check_failure(monkeypatch, nothing_left, Fault(rank, place, what, log))


def test_a_rank_killed_when_it_has_connected(nothing_left: Watch, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """D33 D34: rank 0's thread, which has a group then, notices it later than rank 0 does."""
    monkeypatch.setattr(rendezvous, "POLL_S", 10 * CHECK_INTERVAL_S)
    check_failure(monkeypatch, nothing_left, Fault(1, CONNECTED, "kill", log))


@pytest.mark.parametrize("what", ["kill", pytest.param("raise", marks=pytest.mark.campaign)])
def test_one_of_eight_ranks_fails(
    model_of_eight_heads: Path, nothing_left: Watch, monkeypatch: pytest.MonkeyPatch, log: Path, what: str
) -> None:
    """D33 D34: the six others, which wait in a collective, are not blamed, and end."""
    check_failure(monkeypatch, nothing_left, Fault(5, "decode", what, log), size=8, model=model_of_eight_heads)


@pytest.mark.parametrize("what", ["raise", "kill"])
def test_a_rank_fails_in_a_step_that_async_scheduling_submitted(
    nothing_left: Watch, monkeypatch: pytest.MonkeyPatch, log: Path, what: str
) -> None:
    """D33: while the tokens of the step before are pending."""
    check_failure(monkeypatch, nothing_left, Fault(1, "decode", what, log), async_scheduling=True)


def test_an_error_of_rank_0_closes_the_engine_and_a_new_one_starts(
    nothing_left: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D33: the others wait in a collective that rank 0 does not reach. D34: close() after a failure, and twice."""
    llm = engine()
    expected = generate(llm)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("planted on rank 0")

    with monkeypatch.context() as planted:
        planted.setattr(llm._core.executor._runner, "run", fail)
        with pytest.raises(torch.OutOfMemoryError, match="planted on rank 0"):
            generate(llm)
    with pytest.raises(RuntimeError, match=CLOSED):
        generate(llm)
    llm.close()
    llm.close()
    with engine() as fresh:
        assert generate(fresh) == expected


def test_a_checkpoint_that_no_rank_can_load_is_a_value_error(
    nothing_left: Watch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """D33: whichever rank fails first."""
    directory = tmp_path_factory.mktemp("broken")
    for path in bundled_model_path().glob("*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        LLM(str(directory), tensor_parallel_size=2, **OPTIONS)


def test_sizes_that_the_ranks_cannot_divide_are_refused_before_a_process_starts(
    nothing_left: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D36."""
    started: list[object] = []
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", started.append)
    with pytest.raises(ValueError, match="tensor_parallel_size must divide the model's num_attention_heads=4, got 8"):
        engine(8)
    assert not started


def test_the_timeouts_add_up_to_less_than_ten_seconds() -> None:
    """D33: from a rank's end to the error: the other ranks' reports, and rank 0's wait for the root cause, or for the
    end of an attempt to connect, in which it waits for an address first.
    """
    assert FAILURE_COLLECT_S + ROOT_CAUSE_TIMEOUT_S < MAX_SECONDS
    assert ADDRESS_TIMEOUT_S + CONNECT_TIMEOUT_S < ROOT_CAUSE_TIMEOUT_S
