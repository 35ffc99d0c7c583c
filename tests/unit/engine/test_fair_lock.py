"""FairLock: one thread at a time, in the order of asking, and any number of times in the same thread."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm.engine.fair_lock import FairLock, _Ticket
from tests.support.limits import HANG_SECONDS, wait_until


def start(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive(), "a thread waits for the lock and never gets it"


def test_threads_enter_in_the_order_of_asking() -> None:
    """D81: also before the thread that leaves and asks again at once."""
    lock, entered = FairLock(), []

    def enter(number: int) -> None:
        with lock:
            entered.append(number)

    threads = []
    with lock:
        with lock:  # re-entrant: held until it has been released as often as acquired
            for number in range(5):
                threads.append(start(lambda number=number: enter(number)))
                wait_until(lambda: len(lock._queue) == number + 2)  # noqa: B023  (called at once)
        time.sleep(0.05)
        assert entered == []
    enter(5)
    join(*threads)
    assert entered == [0, 1, 2, 3, 4, 5]


def test_an_exception_in_the_waiting_gives_the_place_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """D81: as Ctrl-C in the main thread does; those behind it enter."""
    lock = FairLock()
    events: list[str] = []
    is_inside, may_leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_inside.set()
            assert may_leave.wait(HANG_SECONDS)

    def be_interrupted() -> None:
        class Interrupted(_Ticket):
            def get(self, *_: object) -> None:
                events.append("waits")
                raise KeyboardInterrupt

        with monkeypatch.context() as planted:
            planted.setattr("nanovllm.engine.fair_lock._Ticket", Interrupted)
            with pytest.raises(KeyboardInterrupt), lock:
                events.append("inside")

    def enter() -> None:
        with lock:
            events.append("entered")

    holder = start(hold)
    assert is_inside.wait(HANG_SECONDS)
    be_interrupted()
    wait_until(lambda: len(lock._queue) == 1)
    last = start(enter)
    wait_until(lambda: len(lock._queue) == 2)
    may_leave.set()
    join(holder, last)
    assert events == ["waits", "entered"]
    with lock:
        pass


def test_try_enter_never_waits() -> None:
    """D81: not even for the thread itself."""
    lock = FairLock()
    assert lock.try_acquire()
    assert not lock.try_acquire()
    results: list[bool] = []
    join(start(lambda: results.append(lock.try_acquire())))
    assert results == [False]
    lock.release()
    assert lock.try_acquire()
    lock.release()
    assert not lock._queue
