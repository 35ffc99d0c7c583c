"""Examines one target in this process: every contract, its verdict, and the smallest scenario of a broken one."""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.components import explore, shrinking
from tests.conformance.components.adapters import NotRecognised
from tests.conformance.components.bounds import CALL_SECONDS, SHORT_CALL_SECONDS
from tests.conformance.components.contracts import AHEAD, CONTRACTS, Contract
from tests.conformance.components.explore import Scenario
from tests.conformance.components.picture import picture
from tests.conformance.components.target import MOVES, Broken, Target, loaded

HOLDS, BROKEN, NOT_APPLICABLE = "holds", "broken", "not applicable"
Report = Callable[[dict[str, Any]], None]
MAX_SHRUNK = 2  # scenarios that break one contract; the smallest that comes of them is shown


@dataclass
class Job:
    """What to examine. path: the source that is loaded; shown: the path in scripts.

    start, broken, checked: what an earlier process found before the target ended it; the next scenario to run.
    """

    path: str
    shown: str
    num_scenarios: int
    seed: int
    start: int = 0
    broken: dict[str, tuple[Scenario, str, str]] = field(default_factory=dict)
    checked: Counter[str] = field(default_factory=Counter)
    not_applicable: dict[str, str] = field(default_factory=dict)


def broken_row(job: Job, contract: str) -> dict[str, Any]:
    """What a report says of a contract that a drawn scenario has broken."""
    scenario, message, shown = job.broken[contract]
    script = scenario.script(job.shown, contract, message)
    return {"message": message, "script": script, "picture": shown, "num_steps": scenario.num_steps}


class Examination:
    """One run of a Job. report: called with events: "target", "progress", "finding", and a "verdict" a contract.

    remember: called with what runs next (a contract's id or "", its scenario or None), so that another process knows
        it if this one is ended by the target.
    """

    def __init__(self, job: Job, report: Report, remember: Callable[..., None], deadline: float) -> None:
        self.job, self.report, self.remember, self.deadline = job, report, remember, deadline
        self.num_shrunk = Counter(dict.fromkeys(job.broken, MAX_SHRUNK))

    def run(self) -> None:
        found = loaded(Path(self.job.path))
        event = {"package": found["package"].name, "stand_ins": found["stand_ins"], "reasons": found["reasons"]}
        self.report({"event": "target", **event})
        hidden = ""
        try:
            self._explore()
        except NotRecognised as error:
            hidden = str(error)
        verdicts = {}
        for contract in sorted(CONTRACTS.values(), key=lambda contract: not contract.script):
            self.remember(contract.id, None)
            verdicts[contract.id] = (
                self._run_script(contract) if contract.script else self._verdict(contract.id, hidden)
            )
        for contract in CONTRACTS.values():
            causes = [name for name in contract.implied_by if verdicts[name]["verdict"] == BROKEN]
            if causes and verdicts[contract.id]["verdict"] != NOT_APPLICABLE:
                reason = f"{causes[0]} is broken, and with it this one"
                verdicts[contract.id] = {"verdict": NOT_APPLICABLE, "reason": reason}
            self.report({"event": "verdict", "id": contract.id, **verdicts[contract.id]})

    def _explore(self) -> None:
        job = self.job
        self.is_chunked = explore.probe_chunked(job.path)
        can_abort = explore.probe_abort(job.path)
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
            self._report_progress(number)
            self._run_one(scenario)
        if Target(job.path).adapter.can_swap and not job.checked[MOVES]:
            job.not_applicable[MOVES] = "no scenario has one, with the defaults of the fork's Config"
        self._report_progress(job.num_scenarios)

    def _run_one(self, scenario: Scenario) -> None:
        job = self.job
        self.remember("", scenario)
        muted = {contract for contract in job.broken if self.num_shrunk[contract] == MAX_SHRUNK}
        seconds = SHORT_CALL_SECONDS if "C16" in job.broken else CALL_SECONDS
        outcome = explore.run(job.path, scenario, muted, seconds, is_patient="C17" not in job.broken)
        job.checked.update(outcome.checked)
        job.not_applicable = outcome.not_applicable | job.not_applicable
        if outcome.contract is None or self.num_shrunk[outcome.contract] == MAX_SHRUNK:
            return
        self.num_shrunk[outcome.contract] += 1
        smallest, message, picture = self._shrunk(outcome)
        best = job.broken.get(outcome.contract)
        if best is None or shrinking.size(smallest) < shrinking.size(best[0]):
            job.broken[outcome.contract] = (smallest, message, picture)
            event = {"contract": outcome.contract, "scenario": smallest.as_json()}
            event |= {"message": message, "picture": picture}
            self.report({"event": "finding", **event})

    def _report_progress(self, number: int) -> None:
        job = self.job
        event = {"done": number, "of": job.num_scenarios, "checked": job.checked, "skipped": job.not_applicable}
        self.report({"event": "progress", **event})

    def _shrunk(self, outcome: explore.Outcome) -> tuple[Scenario, str, str]:
        said = {outcome.scenario: (outcome.message, outcome.picture)}
        muted = set(CONTRACTS) - {outcome.contract}

        def still_breaks(candidate: Scenario) -> Scenario | None:
            candidate = shrinking.without_finish(candidate)
            if not shrinking.is_legal(candidate, self.is_chunked):
                return None
            self.remember(outcome.contract, candidate)
            found = explore.run(self.job.path, candidate, muted, SHORT_CALL_SECONDS)
            if found.contract != outcome.contract:
                return None
            said[found.scenario] = (found.message, found.picture)
            return found.scenario

        smallest = shrinking.shrink(outcome.scenario, still_breaks)
        return smallest, *said[smallest]

    def _verdict(self, contract: str, hidden: str) -> dict[str, Any]:
        job = self.job
        if contract in job.broken:
            return {"verdict": BROKEN} | broken_row(job, contract)
        if contract in job.not_applicable or hidden:
            return {"verdict": NOT_APPLICABLE, "reason": job.not_applicable.get(contract, hidden)}
        if not job.checked[contract]:
            before = [name for name in job.broken if not CONTRACTS[name].is_isolated]
            why = f"these are broken before it: {', '.join(before)}" if before else CONTRACTS[contract].is_about
            return {"verdict": NOT_APPLICABLE, "reason": f"no scenario came to the check: {why or 'none had the case'}"}
        return {"verdict": HOLDS, "checked": job.checked[contract]}

    def _run_script(self, contract: Contract) -> dict[str, Any]:
        names: dict[str, Any] = {"Target": Target, "PATH": self.job.path}
        try:
            exec(compile(contract.script, f"<{contract.id}>", "exec"), names)
        except NotRecognised as error:
            return {"verdict": NOT_APPLICABLE, "reason": str(error)}
        except Broken as error:
            if error.contract != contract.id:
                return {"verdict": NOT_APPLICABLE, "reason": f"{error.contract} is broken before: {error.message}"}
            lines = contract.script.replace("PATH", repr(self.job.shown))
            script = f"{explore.IMPORT}\n\n{lines}"
            shown = picture(names.get("target") or names.get("first"))
            row = {"message": error.message, "script": script, "picture": shown, "num_steps": lines.count("\n")}
            return {"verdict": BROKEN} | row
        except Exception as error:
            return {"verdict": NOT_APPLICABLE, "reason": f"its script raises {type(error).__name__}: {error}"}
        return {"verdict": HOLDS, "checked": 1}
