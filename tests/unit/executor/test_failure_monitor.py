"""FailureMonitor, whose workers are only pipes here: its states, the root cause, and what it calls on a failure."""

import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import pytest

from nanovllm.executor import failure_monitor
from nanovllm.executor.base import RankError, RankValueError
from nanovllm.executor.failure_monitor import READY, FailureMonitor, RankFailure, State, find_root_cause
from tests.support.limits import HANG_SECONDS, wait_until


def failure(cause: str, time: float = 1.0) -> RankFailure:
    return RankFailure(cause, f"the traceback of {cause}", is_value_error=False, time=time)


class Workers:
    """Pipes in place of ranks 1, 2, ...; calls: what the monitor calls, in order."""

    def __init__(self, count: int) -> None:
        pipes = {rank: Pipe(duplex=False) for rank in range(1, count + 1)}
        self.senders = {rank: sender for rank, (_, sender) in pipes.items()}
        self.calls: list[Any] = []
        self.monitor = FailureMonitor(
            {rank: receiver for rank, (receiver, _) in pipes.items()},
            exit_code=lambda rank: 3,
            terminate=lambda: self.calls.append("terminate"),
            unblock=lambda: self.calls.append(("unblock", self.monitor._state)),
        )

    def root_cause(self) -> str:
        return str(self.monitor.wait_for_root_cause(HANG_SECONDS))


@pytest.fixture
def start() -> Iterator[Callable[[int], Workers]]:
    started: list[Workers] = []

    def start(count: int) -> Workers:
        started.append(Workers(count))
        return started[-1]

    yield start
    for workers in started:
        workers.monitor.close()
        assert not workers.monitor._thread.is_alive()


Start = Callable[[int], Workers]


def test_the_state_is_running_when_all_workers_are_ready(start: Start) -> None:
    workers = start(2)
    workers.senders[2].send(READY)
    time.sleep(0.1)  # for the thread, which must not change it
    assert workers.monitor._state is State.STARTING
    workers.senders[1].send(READY)
    wait_until(lambda: workers.monitor._state is State.RUNNING)
    workers.monitor.check()
    assert workers.monitor.stop() is State.STOPPING
    workers.senders[1].close()
    assert workers.monitor.wait_for_root_cause(0.1) is None
    assert workers.calls == []


def test_an_error_of_the_thread_itself_is_raised(start: Start) -> None:
    """Else rank 0 would wait without end for a rank whose failure nothing reports."""
    workers = start(1)
    workers.monitor._exit_code = lambda rank: {}[rank]
    workers.senders[1].close()
    wait_until(lambda: not workers.monitor._thread.is_alive())
    with pytest.raises(KeyError):
        workers.monitor.check()


@pytest.mark.parametrize(("ready", "message"), [([1, 2], "without an error message"), ([2], "while it started; ")])
def test_a_worker_ends_before_or_after_all_workers_are_ready(start: Start, ready: list[int], message: str) -> None:
    workers = start(2)
    for rank in ready:
        workers.senders[rank].send(READY)
    workers.senders[1].close()
    assert workers.root_cause().startswith(f"rank 1 of 3 ended with exit code 3 {message}")


def test_the_first_failure_is_the_root_cause_though_it_is_reported_later(start: Start) -> None:
    """D33: the rank may have had more to free than those that failed because of it."""
    workers = start(2)
    workers.senders[1].send(failure("consequence", 2.0))
    time.sleep(0.1)
    workers.senders[2].send(failure("cause", 1.0))
    assert workers.root_cause().startswith("rank 2 of 3 failed: cause")


def test_a_rank_that_reports_nothing_does_not_delay_the_failure_of_another(start: Start) -> None:
    """D33: it waits in a collective. The state is FAILED before rank 0 is unblocked, which would otherwise mistake the
    output of a broken collective for a result.
    """
    workers = start(2)
    workers.senders[2].send(failure("cause"))
    assert workers.root_cause().startswith("rank 2 of 3 failed: cause")
    assert workers.monitor.stop() is State.FAILED
    assert workers.calls == ["terminate", ("unblock", State.FAILED)]
    workers.monitor.fail()  # as rank 0 does when it notices: the root cause stays
    with pytest.raises(RankError, match="rank 2 of 3 failed: cause"):
        workers.monitor.check()


def test_rank_0_fails_itself(start: Start) -> None:
    """D33: the executor terminates the workers; a thread that still connects to them stops."""
    workers = start(1)
    workers.monitor.fail()
    assert workers.monitor.stop() is State.FAILED
    assert workers.calls == []
    with pytest.raises(RuntimeError, match="rank 0 has failed"):
        workers.monitor.check()
    assert workers.monitor.wait_for_root_cause(HANG_SECONDS) is None


def test_without_pipes_it_has_no_thread_and_keeps_the_state(start: Start) -> None:
    """As under torchrun. Rank 0 may fail while the workers end, which it does not ask them once more then."""
    monitor = start(0).monitor
    assert not monitor._thread.is_alive()
    monitor.check()
    assert monitor.stop() is State.STOPPING
    monitor.fail()
    assert monitor.stop() is State.FAILED
    assert monitor.wait_for_root_cause(HANG_SECONDS) is None


def test_a_closed_monitor_stays_closed(start: Start) -> None:
    monitor = start(1).monitor
    for change in (monitor.close, monitor.fail, monitor.stop, monitor.close):
        change()
        assert monitor._state is State.CLOSED
    monitor.check()


def root_cause(failures: dict[int, RankFailure | None], code: int = 1, is_starting: bool = False) -> RankError:
    return find_root_cause(failures, 4, {2: code}.get, is_starting)


@pytest.mark.parametrize(
    ("code", "is_starting", "message"),
    [
        (3, False, "ended with exit code 3 without an error message"),
        (0, False, "ended with exit code 0 without an error message"),
        (1, True, "ended with exit code 1 while it started; its own output says more. A program that"),
        (-11, True, "was killed by SIGSEGV; its own output may say more"),
        (-40, False, "was killed by signal 40; its own"),
        (-9, False, "was killed by SIGKILL: by a user, or"),
    ],
)
def test_a_rank_that_ended_without_a_report_failed_before_those_that_report(code, is_starting, message) -> None:
    """D33: and the message says how it ended."""
    reported = failure("connection closed")
    error = root_cause({1: reported, 2: None, 3: reported}, code, is_starting)
    assert str(error).startswith(f"rank 2 of 4 {message}")


def test_a_report_has_the_cause_the_end_of_the_traceback_and_the_kind() -> None:
    try:
        raise ValueError("x" * failure_monitor.MAX_TRACEBACK_CHARS + " the end")
    except ValueError as error:
        report = RankFailure.of(error)
    assert report.cause.startswith("ValueError: xxx")
    assert report.traceback.endswith("the end\n")
    assert len(report.traceback) == failure_monitor.MAX_TRACEBACK_CHARS
    assert type(root_cause({1: report})) is RankValueError
    assert not RankFailure.of(MemoryError()).is_value_error
