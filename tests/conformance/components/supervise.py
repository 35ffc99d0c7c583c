"""Examines targets in child processes, which the target may hang, crash or fill without harm to this one."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import xxhash

from tests.conformance.components import bounds, explore, shrinking
from tests.conformance.components.contracts import CONTRACTS
from tests.conformance.components.examine import Examination, Job, broken_by, not_applicable
from tests.conformance.components.explore import Scenario
from tests.conformance.components.loading import NotRecognised, find_package

STALL_SECONDS = 20.0  # of CPU time without an event: the child hangs where Python's signals do not reach
BLOCKED_SECONDS = 60.0  # by the clock without an event: it waits for something
MAX_RESTARTS = 20
MAX_PROCESSES = 200  # to shrink a scenario that ends its process
ENDED_WELL = 42  # exit code of a child, which a target is unlikely to give
PRELOADED = (torch, torch.distributed, xxhash)  # once, and not in each child
FORK = multiprocessing.get_context("fork")


def examine_target(
    path: Path, num_scenarios: int, seed: int, seconds: float, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """The verdicts on the checkout at `path`: {"target", "package", "stand_ins", "reasons", "verdicts": {id: ...}}.

    seconds: no scenario is drawn after that time. Raises NotRecognised if `path` is no checkout.
    """
    find_package(path)
    folder = Path(tempfile.mkdtemp(prefix="conformance-"))
    try:
        copy = bounds.copy_source(path.resolve(), folder)
        return _Supervisor(Job(str(copy), str(path), num_scenarios, seed), seconds, progress).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Supervisor:
    def __init__(self, job: Job, seconds: float, progress: Callable[[int, int], None]) -> None:
        self.job = job
        self.deadline = time.monotonic() + seconds
        self.progress = progress

    def run(self) -> dict[str, Any]:
        for number in range(MAX_RESTARTS + 1):
            end = self._run_child()
            if not end:
                break
            self._take_ended(end)
            if number == MAX_RESTARTS - 1:
                self.job.start = self.job.num_scenarios  # the contracts that have a script are left
        job = self.job
        found = dict.fromkeys(CONTRACTS, not_applicable(f"the target's process {end}")) | job.broken | job.verdicts
        notes = [f"{what}: {reason}" for what, reason in job.not_applicable.items() if what not in CONTRACTS]
        result = {"target": job.shown, "seed": job.seed, "num_scenarios": job.num_scenarios} | job.target
        return result | {"verdicts": found, "notes": notes}

    def _run_child(self) -> str:
        """Run the job in a child. Returns how the target ended it, "" if it came to its end."""
        self.running: dict[str, Any] = {"contract": "", "scenario": None}
        events, write = FORK.Pipe(duplex=False)
        child = FORK.Process(target=_examine, args=(events, write, self.job, self.deadline), daemon=True)
        sys.stdout.flush()
        child.start()
        write.close()
        is_done = is_stalled = False
        latest, used = time.monotonic(), 0.0  # of the latest event: its time, and the child's CPU time
        with events:
            while not is_stalled:
                if not events.poll(STALL_SECONDS):
                    is_blocked = time.monotonic() - latest >= BLOCKED_SECONDS
                    is_stalled = is_blocked or _cpu_seconds(child.pid) - used >= STALL_SECONDS  # else it is slow
                    continue
                try:
                    event = events.recv_bytes()
                except (EOFError, OSError):  # the child has ended, in the middle of an event if it was killed
                    break
                latest, used = time.monotonic(), _cpu_seconds(child.pid)
                is_done |= self._take_event(**json.loads(event))
        return _end(child, is_stalled, is_done)

    def _take_event(self, kind: str, value: Any) -> bool:
        """Whether it is the last one."""
        if kind == "job":
            self.job = Job(**value)
            self.job.checked = Counter(value["checked"])
            self.progress(self.job.start, self.job.num_scenarios)
        elif kind == "running":
            self.running = value
        elif kind == "refused":
            raise NotRecognised(value)
        return kind == "done"

    def _take_ended(self, end: str) -> None:
        """The target ended its process: what ran then is a finding, and the next child goes on behind it."""
        job, message = self.job, f"the target's process {end}"
        if self.running["scenario"] is None:
            if self.running["contract"]:
                job.verdicts[self.running["contract"]] = not_applicable(message)
            job.start = job.num_scenarios
            return
        job.start += 1
        if "C16" not in job.broken:
            smallest = self._shrunk(Scenario.from_json(self.running["scenario"]))
            job.broken["C16"] = broken_by(smallest, job.shown, "C16", message)

    def _shrunk(self, scenario: Scenario) -> Scenario:
        """Up to its finish: how far the process came is not known."""

        def still_ends(candidate: Scenario) -> Scenario | None:
            is_legal = shrinking.is_legal(candidate, is_chunked=candidate.setup.max_num_batched_tokens < 64)
            return candidate if is_legal and _ends_process(self.job, candidate) else None

        smallest = shrinking.shrink(scenario, still_ends, max_runs=MAX_PROCESSES)
        return Scenario(smallest.setup, (*smallest.steps, ("finish",)))


def _cpu_seconds(pid: int | None) -> float:
    """CPU time of a process so far; infinite where the system does not say, so that only the clock counts there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _end(child: Any, is_stalled: bool, is_done: bool) -> str:
    """Wait for the child and end whatever it has started. Returns how it ended, "" if as it should."""
    if is_stalled:
        child.kill()
    child.join()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    if is_done:
        return ""
    if is_stalled:
        return f"did nothing for {STALL_SECONDS:g} s of CPU time, or {BLOCKED_SECONDS:g} s, and was ended"
    if child.exitcode < 0:
        return f"was ended by {signal.Signals(-child.exitcode).name}"
    return f"ended itself with exit code {child.exitcode}"


def _examine(read: Connection, events: Connection, job: Job, deadline: float) -> None:
    """The child's whole life: it leaves through os._exit, and neither flushes nor unwinds what it has of its parent."""
    read.close()  # else the pipe stays open when the parent is killed, and the child waits forever to write to it

    def send(kind: str, value: Any = None) -> None:
        try:
            events.send_bytes(json.dumps({"kind": kind, "value": value}).encode())
        except BrokenPipeError:
            os._exit(1)

    def remember(contract: str, scenario: Scenario | None) -> None:
        send("running", {"contract": contract, "scenario": scenario and scenario.as_json()})

    _confine(job)
    try:
        Examination(job, lambda job: send("job", vars(job)), remember, deadline).run()
        send("done")
    except NotRecognised as error:
        send("refused", str(error))
    os._exit(0)


def _confine(job: Job) -> None:
    """A process group of its own, no terminal, no input and no output, and the limits of bounds.py."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    bounds.confine(str(Path(job.path).parent))


def _run_alone(job: Job, scenario: Scenario) -> None:
    with suppress(BaseException):
        _confine(job)
        explore.run(job.path, scenario, set(CONTRACTS))
    os._exit(ENDED_WELL)


def _ends_process(job: Job, scenario: Scenario) -> bool:
    """Whether the scenario ends its process, or hangs it."""
    child = FORK.Process(target=_run_alone, args=(job, scenario), daemon=True)
    child.start()
    child.join(STALL_SECONDS / 4)
    exit_code = child.exitcode
    child.kill()
    child.join()
    return exit_code != ENDED_WELL
