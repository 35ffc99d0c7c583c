"""Examines targets in child processes, which the target may hang, crash or fill without harm to this one."""

import json
import math
import mmap
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import xxhash

from tests.conformance.components import bounds, explore, shrinking
from tests.conformance.components.contracts import CONTRACTS
from tests.conformance.components.examine import BROKEN, NOT_APPLICABLE, Examination, Job, broken_row
from tests.conformance.components.explore import Scenario
from tests.conformance.components.loading import NotRecognised, find_package

STALL_SECONDS = 20.0  # of CPU time without an event: the child hangs where Python's signals do not reach
BLOCKED_SECONDS = 60.0  # by the clock without an event: it waits for something
MAX_RESTARTS = 20
MAX_PROCESSES = 200  # to shrink a scenario that ends its process
NOTE_BYTES = 2**16
ENDED_WELL = 42  # exit code of a child, which a target is unlikely to give
PRELOADED = (torch, torch.distributed, xxhash)  # once, and not in each child


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
        self.note = mmap.mmap(-1, NOTE_BYTES)
        self.result: dict[str, Any] = {
            "target": job.shown,
            "seed": job.seed,
            "num_scenarios": job.num_scenarios,
            "verdicts": {},
        }

    def run(self) -> dict[str, Any]:
        end = self._run_child()
        for number in range(MAX_RESTARTS):
            if not end:
                break
            self._take_ended(end)
            if number == MAX_RESTARTS - 1:
                self.job.start = self.job.num_scenarios  # the contracts that have a script are left
            end = self._run_child()
        self.result["notes"] = [f"{k}: {v}" for k, v in self.job.not_applicable.items() if k not in CONTRACTS]
        verdicts = self.result["verdicts"]
        for contract in CONTRACTS:
            if contract in self.job.broken and contract not in verdicts:
                verdicts[contract] = {"verdict": BROKEN} | broken_row(self.job, contract)
            verdicts.setdefault(contract, {"verdict": NOT_APPLICABLE, "reason": f"the target's process {end}"})
        return self.result

    def _run_child(self) -> str:
        """Run the job in a child. Returns how the target ended it, "" if it came to its end."""
        read, write = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _child(write, self.job, self.note, self.deadline)
        os.close(write)
        is_done, is_stalled = False, False
        latest, used = time.monotonic(), 0.0  # of the latest event: its time, and the child's CPU time
        with os.fdopen(read, "rb") as pipe:
            while True:
                if not select.select([pipe], [], [], STALL_SECONDS)[0]:
                    is_blocked = time.monotonic() - latest >= BLOCKED_SECONDS
                    if not is_blocked and _cpu_seconds(pid) - used < STALL_SECONDS:
                        continue  # the machine is busy
                    is_stalled = True
                    break
                line = pipe.readline()
                latest, used = time.monotonic(), _cpu_seconds(pid)
                if not line:
                    break
                is_done |= self._take_event(json.loads(line))
        return _end_child(pid, is_stalled, is_done)

    def _take_event(self, event: dict[str, Any]) -> bool:
        kind = event.pop("event")
        if kind == "target":
            self.result |= event
        elif kind == "progress":
            self.job.start = event["done"]
            self.job.checked = Counter(event["checked"])
            self.job.not_applicable = event["skipped"]
            self.progress(event["done"], event["of"])
        elif kind == "finding":
            scenario = Scenario.from_json(event["scenario"])
            self.job.broken[event["contract"]] = (scenario, event["message"], event["picture"])
        elif kind == "verdict":
            self.result["verdicts"][event.pop("id")] = event
        elif kind == "refused":
            raise NotRecognised(event["reason"])
        return kind == "done"

    def _take_ended(self, end: str) -> None:
        """The target ended its process: what ran then is a finding, and the next child goes on behind it."""
        length = int.from_bytes(self.note[:4], "little")
        noted = json.loads(self.note[4 : 4 + length]) if length else {"what": "", "scenario": None}
        message = f"the target's process {end}"
        if noted["scenario"] is None:
            if noted["what"]:
                self.result["verdicts"][noted["what"]] = {"verdict": NOT_APPLICABLE, "reason": message}
            self.job.start = self.job.num_scenarios
            return
        self.job.start += 1
        if "C16" not in self.job.broken:
            scenario = Scenario.from_json(noted["scenario"])
            self.job.broken["C16"] = (self._shrunk(scenario), message, "")

    def _shrunk(self, scenario: Scenario) -> Scenario:
        """Up to its finish: how far the process came is not known."""

        def still_ends(candidate: Scenario) -> Scenario | None:
            is_legal = shrinking.is_legal(candidate, is_chunked=candidate.setup.max_num_batched_tokens < 64)
            return candidate if is_legal and _ends_process(self.job, candidate) else None

        smallest = shrinking.shrink(scenario, still_ends, max_runs=MAX_PROCESSES)
        return Scenario(smallest.setup, (*smallest.steps, ("finish",)))


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process so far; infinite where the system does not say, so that only the clock counts there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _end_child(pid: int, is_stalled: bool, is_done: bool) -> str:
    """Wait for the child and end whatever it has started. Returns how it ended, "" if as it should."""
    if is_stalled:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if is_done:
        return ""
    if is_stalled:
        return f"did nothing for {STALL_SECONDS:g} s of CPU time, or {BLOCKED_SECONDS:g} s, and was ended"
    if os.WIFSIGNALED(status):
        return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended itself with exit code {os.WEXITSTATUS(status)}"


def _child(write: int, job: Job, note: mmap.mmap, deadline: float) -> None:
    """The child's whole life: it leaves through os._exit, and neither flushes nor unwinds what it has of its parent."""
    _detach(write)
    with os.fdopen(write, "w", buffering=1) as pipe:

        def report(event: dict[str, Any]) -> None:
            pipe.write(json.dumps(event) + "\n")

        def remember(what: str, scenario: Scenario | None) -> None:
            value = json.dumps({"what": what, "scenario": scenario and scenario.as_json()}).encode()[: NOTE_BYTES - 4]
            note[: 4 + len(value)] = len(value).to_bytes(4, "little") + value

        try:
            bounds.confine(str(Path(job.path).parent))
            Examination(job, report, remember, deadline).run()
            report({"event": "done"})
        except NotRecognised as error:
            report({"event": "refused", "reason": str(error)})
        pipe.flush()
        os._exit(0)


def _detach(kept: int) -> None:
    """A process group of its own, no terminal, no input and no output."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        if stream != kept:
            os.dup2(null, stream)


def _ends_process(job: Job, scenario: Scenario) -> bool:
    """Whether the scenario ends its process, or hangs it."""
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            _detach(-1)
            bounds.confine(str(Path(job.path).parent))
            explore.run(job.path, scenario, set(CONTRACTS))
        os._exit(ENDED_WELL)
    end = time.monotonic() + STALL_SECONDS / 4
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return not os.WIFEXITED(status) or os.WEXITSTATUS(status) != ENDED_WELL
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True
