"""Many starts and many failures, also with four ranks and at any moment: `python -m pytest -m campaign`, some minutes.

Seeds of the random moments are printed with a failure.
"""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nanovllm.executor.base import RankError
from tests.support.counts import count_event, record_error
from tests.support.rank_engines import MAX_SECONDS, check_failure, engine, generate
from tests.support.rank_faults import CONNECTED, CONNECTING, ERRORS, PLACES, Fault, plant
from tests.support.resource_snapshot import Watch

pytestmark = pytest.mark.campaign

SEED = os.environ.get("NANOVLLM_TEST_SEED", "0")
NUM_STARTS = 100
NUM_KILLS = 30
NUM_INTERRUPTS = 30
MAX_SECONDS_TO_START = 8  # roughly: the kills are to fall on the start and on the steps
SUSPENDED_SECONDS = 8  # longer than ROOT_CAUSE_TIMEOUT_S


def test_a_hundred_starts_and_stops_leave_nothing(nothing_left: Watch) -> None:
    """D33 D34: processes, segments, semaphores, files, sockets, threads and temporary directories, after each."""
    expected = None
    before = nothing_left.snapshot()
    for start in range(NUM_STARTS):
        llm = engine()
        tokens = generate(llm)
        expected = expected or tokens
        assert tokens == expected
        if start % 2:
            llm.close()
        del llm
        assert nothing_left.snapshot() == before, f"after start {start}"
        count_event("an engine with two ranks started and stopped")


@pytest.mark.parametrize(
    ("place", "what"),
    [
        *((place, what) for place in (CONNECTING, CONNECTED) for what in ("kill", "exit")),
        *((place, what) for place in PLACES for what in ("kill", "exit", *ERRORS)),
    ],
)
@pytest.mark.parametrize("rank", [1, 3])
def test_one_of_four_ranks_fails(
    nothing_left: Watch, monkeypatch: pytest.MonkeyPatch, log: Path, rank: int, what: str, place: str
) -> None:
    """D33: the two others have done nothing wrong, and are not blamed."""
    check_failure(monkeypatch, nothing_left, Fault(rank, place, what, log), size=4)


@pytest.mark.parametrize("place", [CONNECTING, *PLACES])
def test_a_rank_suspended_anywhere_is_waited_for(
    nothing_left: Watch, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """D33: it is slow, not dead."""
    with engine() as llm:
        expected = generate(llm)
    plant(monkeypatch, Fault(1, place, "stop"))
    with continuing(), engine() as llm:
        assert generate(llm) == expected


@contextmanager
def continuing() -> Iterator[None]:
    """Ranks that stop go on after SUSPENDED_SECONDS; fails if none did."""
    num_continued = 0
    is_over = threading.Event()

    def watch() -> None:
        nonlocal num_continued
        while not is_over.wait(0.1):
            for child in psutil.Process().children():
                if child.status() == psutil.STATUS_STOPPED:
                    is_over.wait(SUSPENDED_SECONDS if not num_continued else 0)
                    child.send_signal(signal.SIGCONT)
                    num_continued += 1

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert num_continued > 0
    count_event("a rank suspended and continued")


def work_for_ever() -> None:
    with engine(4) as llm:
        while True:
            generate(llm)


def kill_one(rng: random.Random, killed_at: list[float]) -> None:
    """Kill a rank of the engine that is started next, within MAX_SECONDS_TO_START."""
    while not multiprocessing.active_children():
        time.sleep(0.001)
    time.sleep(rng.uniform(0, MAX_SECONDS_TO_START))
    pid = rng.choice(multiprocessing.active_children()).pid
    assert pid is not None
    killed_at.append(time.monotonic())
    os.kill(pid, signal.SIGKILL)


def test_a_rank_killed_at_any_moment(nothing_left: Watch) -> None:
    """D33: while it starts, connects, loads, computes or waits; rank 0 raises it in time, and nothing is left."""
    before = nothing_left.snapshot()
    for attempt in range(NUM_KILLS):
        killed_at: list[float] = []
        threading.Thread(target=kill_one, args=(random.Random(f"{SEED}-{attempt}"), killed_at)).start()
        with pytest.raises(RankError, match=r"^rank [123] of 4 was killed by SIGKILL"):
            work_for_ever()
        seconds = time.monotonic() - killed_at[0]
        record_error("seconds from a rank's end to the error", seconds, MAX_SECONDS)
        assert seconds < MAX_SECONDS
        assert nothing_left.snapshot() == before, f"attempt {attempt}"
        count_event("a rank killed at a random moment")


def test_ctrl_c_at_any_moment(nothing_left: Watch, ctrl_c_raises: None) -> None:
    """D33: while the ranks start, connect, load, compute or wait; KeyboardInterrupt is raised, nothing is left."""
    before = nothing_left.snapshot()
    interrupted_at = 0.0

    def interrupt() -> None:
        nonlocal interrupted_at
        interrupted_at = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    for attempt in range(NUM_INTERRUPTS):
        moment = random.Random(f"{SEED}-{attempt}").uniform(0, MAX_SECONDS_TO_START)
        timer = threading.Timer(moment, interrupt)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            timer.start()
            work_for_ever()
        seconds = time.monotonic() - interrupted_at
        record_error("seconds from Ctrl-C to its exception", seconds, MAX_SECONDS)
        assert seconds < MAX_SECONDS
        assert nothing_left.snapshot() == before, f"attempt {attempt}"
        count_event("Ctrl-C at a random moment")
