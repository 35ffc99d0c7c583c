"""Examines one target in this process: every contract, its verdict, and the smallest scenario of a broken one."""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.components import explore, shrinking
from tests.conformance.components.bounds import CALL_SECONDS, SHORT_CALL_SECONDS
from tests.conformance.components.contracts import AHEAD, CONTRACTS, Contract
from tests.conformance.components.explore import Scenario
from tests.conformance.components.loading import NotRecognised, loaded
from tests.conformance.components.picture import picture
from tests.conformance.components.target import MOVES, Broken, Target

HOLDS, BROKEN, NOT_APPLICABLE = "holds", "broken", "not applicable"
Verdict = dict[str, Any]
MAX_SHRUNK = 2  # scenarios that break one contract; the smallest that comes of them is shown


@dataclass
class Job:
    """What to examine, and what is found. A process goes on where the one before was ended by the target.

    path: the source that is loaded; shown: the path in scripts. target: what a report says of the package. start: the
    next scenario to run. broken: verdicts by drawn scenarios; verdicts: those of scripts, and at the end all.
    """

    path: str
    shown: str
    num_scenarios: int
    seed: int
    target: dict[str, Any] = field(default_factory=dict)
    start: int = 0
    broken: dict[str, Verdict] = field(default_factory=dict)
    checked: Counter[str] = field(default_factory=Counter)
    not_applicable: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def not_applicable(reason: str) -> Verdict:
    return {"verdict": NOT_APPLICABLE, "reason": reason}


def broken_by(scenario: Scenario, path: str, contract: str, message: str, shown: str = "") -> Verdict:
    """What a report says of a contract that a drawn scenario has broken. shown: the picture."""
    script = scenario.script(path, contract, message)
    return {
        "verdict": BROKEN, "message": message, "script": script, "picture": shown, "num_steps": len(scenario.steps)
    }  # fmt: skip


class Examination:
    """One run of a Job.

    report: called with the job whenever it has changed. remember: called with the contract and the scenario (None of a
        script) before either is run, so that another process knows it if this one is ended by the target.
    """

    def __init__(self, job: Job, report: Callable[[Job], None], remember: Callable[..., None], deadline: float) -> None:
        self.job, self.report, self.remember, self.deadline = job, report, remember, deadline
        self.num_shrunk = Counter(dict.fromkeys(job.broken, MAX_SHRUNK))
        self.sizes: dict[str, tuple[Any, ...]] = {}  # of the smallest scenario that breaks a contract

    def run(self) -> None:
        job, found = self.job, loaded(Path(self.job.path))
        job.target = {"package": found["package"].name, "stand_ins": found["stand_ins"], "reasons": found["reasons"]}
        hidden = ""
        try:
            self._explore()
        except NotRecognised as error:
            hidden = str(error)
        for contract in CONTRACTS.values():
            if contract.script and contract.id not in job.verdicts:
                self.remember(contract.id, None)
                job.verdicts[contract.id] = self._run_script(contract)
                self.report(job)
        job.verdicts |= {name: self._verdict(name, hidden) for name in CONTRACTS if name not in job.verdicts}
        for contract in CONTRACTS.values():
            causes = [name for name in contract.implied_by if job.verdicts[name]["verdict"] == BROKEN]
            if causes and job.verdicts[contract.id]["verdict"] != NOT_APPLICABLE:
                job.verdicts[contract.id] = not_applicable(f"{causes[0]} is broken, and with it this one")
        self.report(job)

    def _explore(self) -> None:
        job = self.job
        self.is_chunked = explore.probe_chunked(job.path)
        can_abort = Target(job.path).adapter.abort_name is not None
        no_weak_hash = explore.probe_weak_hash(job.path)
        not_ahead = explore.probe_ahead(job.path)
        if not_ahead:
            job.not_applicable |= {contract.id: not_ahead for contract in CONTRACTS.values() if contract.group == AHEAD}
        if no_weak_hash:
            job.not_applicable["C07"] = no_weak_hash
        if not can_abort:
            job.not_applicable["C24"] = "the scheduler has no method to abort a request"
        rng = random.Random(job.seed)
        for number in range(job.num_scenarios):
            scenario = explore.draw(rng, self.is_chunked, can_abort, not no_weak_hash, not not_ahead)
            if number < job.start:
                continue
            if time.monotonic() > self.deadline:
                break
            job.start = number
            self.report(job)
            self._run_one(scenario)
        if Target(job.path).adapter.can_swap and not job.checked[MOVES]:
            job.not_applicable[MOVES] = "no scenario has one, with the defaults of the fork's Config"
        job.start = job.num_scenarios
        self.report(job)

    def _run_one(self, scenario: Scenario) -> None:
        job = self.job
        self.remember("", scenario)
        muted = {contract for contract in job.broken if self.num_shrunk[contract] == MAX_SHRUNK}
        seconds = SHORT_CALL_SECONDS if "C16" in job.broken else CALL_SECONDS
        outcome = explore.run(job.path, scenario, muted, seconds, is_patient="C17" not in job.broken)
        job.checked.update(outcome.checked)
        job.not_applicable = outcome.not_applicable | job.not_applicable
        contract = outcome.contract
        if contract is None or self.num_shrunk[contract] == MAX_SHRUNK:
            return
        self.num_shrunk[contract] += 1
        smallest = self._shrunk(outcome)
        size = shrinking.size(smallest.scenario)
        if size < self.sizes.get(contract, (float("inf"),)):
            self.sizes[contract] = size
            job.broken[contract] = broken_by(smallest.scenario, job.shown, contract, smallest.message, smallest.picture)

    def _shrunk(self, outcome: explore.Outcome) -> explore.Outcome:
        outcomes = {outcome.scenario: outcome}
        muted = set(CONTRACTS) - {outcome.contract}

        def still_breaks(candidate: Scenario) -> Scenario | None:
            candidate = shrinking.without_finish(candidate)
            if not shrinking.is_legal(candidate, self.is_chunked):
                return None
            self.remember(outcome.contract, candidate)
            found = explore.run(self.job.path, candidate, muted, SHORT_CALL_SECONDS)
            if found.contract != outcome.contract:
                return None
            outcomes[found.scenario] = found
            return found.scenario

        return outcomes[shrinking.shrink(outcome.scenario, still_breaks)]

    def _verdict(self, contract: str, hidden: str) -> Verdict:
        job = self.job
        if contract in job.broken:
            return job.broken[contract]
        if contract in job.not_applicable or hidden:
            return not_applicable(job.not_applicable.get(contract, hidden))
        if not job.checked[contract]:
            before = [name for name in job.broken if not CONTRACTS[name].is_isolated]
            why = f"these are broken before it: {', '.join(before)}" if before else CONTRACTS[contract].is_about
            return not_applicable(f"no scenario came to the check: {why or 'none had the case'}")
        return {"verdict": HOLDS, "checked": job.checked[contract]}

    def _run_script(self, contract: Contract) -> Verdict:
        names: dict[str, Any] = {"Target": Target, "PATH": self.job.path}
        try:
            exec(compile(contract.script, f"<{contract.id}>", "exec"), names)
        except NotRecognised as error:
            return not_applicable(str(error))
        except Broken as error:
            if error.contract != contract.id:
                return not_applicable(f"{error.contract} is broken before: {error.message}")
            lines = contract.script.replace("PATH", repr(self.job.shown))
            script = f"{explore.IMPORT}\n\n{lines}"
            shown = picture(names.get("target") or names.get("first"))
            row = {"message": error.message, "script": script, "picture": shown, "num_steps": lines.count("\n")}
            return {"verdict": BROKEN} | row
        except Exception as error:
            return not_applicable(f"its script raises {type(error).__name__}: {error}")
        return {"verdict": HOLDS, "checked": 1}
