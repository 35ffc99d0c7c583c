"""Of the ranks that failed, which one is named, and what is said: worked out without processes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.worker.local_ranks import LocalRanks, RankError, RankValueError
from nanovllm.worker.process_group import Place
from nanovllm.worker.rank_process import MAX_TRACEBACK_CHARS, RankReport


def ranks(*exit_codes: int, all_ready: bool = True) -> Any:
    """Rank 0's view of ranks 1, 2, ..., whose processes ended so."""
    view = object.__new__(LocalRanks)
    view.place = Place(0, 1 + len(exit_codes), num_sharing=1 + len(exit_codes))
    view._processes = [SimpleNamespace(exitcode=code, join=lambda timeout: None) for code in exit_codes]
    view._all_ready = SimpleNamespace(done=lambda: all_ready)  # type: ignore[assignment]
    return view


def report(cause: str, time: float, is_value_error: bool = False) -> RankReport:
    return RankReport(cause, f"the traceback of {cause}", is_value_error, time)


def test_the_first_of_several_failures_is_named() -> None:
    """D33: the others failed because of it, and may be heard before."""
    words = {3: report("consequence", 2.0), 2: report("cause", 1.0), 1: report("another", 3.0)}
    error = ranks(1, 1, 1)._cause(words)
    assert str(error) == "rank 2 of 4 failed: cause\n\nIts traceback:\nthe traceback of cause"
    assert type(error) is RankError


def test_a_rank_that_died_without_a_word_came_before_those_that_noticed() -> None:
    """D33: and it is the exit code of that rank which is told."""
    error = ranks(1, -9, 1)._cause({1: report("connection closed", 1.0), 2: None, 3: report("connection closed", 1.0)})
    assert str(error).startswith("rank 2 of 4 was killed by SIGKILL: by hand, or")


@pytest.mark.parametrize(
    ("code", "all_ready", "said"),
    [
        (3, True, "rank 1 of 2 ended with exit code 3 and said nothing"),
        (0, True, "rank 1 of 2 ended with exit code 0 and said nothing"),
        (1, False, "rank 1 of 2 ended with exit code 1 while it started; its own output says more. A program that"),
        (-11, False, "rank 1 of 2 was killed by SIGSEGV"),
        (-40, True, "rank 1 of 2 was killed by signal 40"),
    ],
)
def test_how_a_rank_ended(code: int, all_ready: bool, said: str) -> None:
    assert str(ranks(code, all_ready=all_ready)._cause({1: None})).startswith(said)


def test_what_the_user_chose_wrongly_is_a_value_error_here_too() -> None:
    error = ranks(1)._cause({1: report("ValueError: too little memory", 1.0, is_value_error=True)})
    assert type(error) is RankValueError
    assert isinstance(error, ValueError)


def test_a_report_has_the_cause_the_end_of_the_traceback_and_the_kind() -> None:
    try:
        raise ValueError("x" * MAX_TRACEBACK_CHARS + " the end")
    except ValueError as error:
        told = RankReport.of(error)
    assert told.cause.startswith("ValueError: xxx")
    assert told.traceback.endswith("the end\n")
    assert len(told.traceback) == MAX_TRACEBACK_CHARS
    assert told.is_value_error
    assert not RankReport.of(torch.OutOfMemoryError("none left")).is_value_error
