"""Target: a checkout's scheduler, block manager and input preparation, driven step by step and checked at each.

    target = Target("path/to/checkout", block_size=2, num_blocks=4)
    target.add([0, 1, 0], max_tokens=2)
    target.step()
    target.finish()

In place of a model stands a symbolic cache: a slot holds what the tokens up to its position are, so whatever a step
reads wrongly is known exactly. The first broken contract raises Broken; the order of the checks is that of cause and
effect, so that a fault has one name. Imports nothing of nanovllm, whose name the target's package has.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conformance.components import input_checks, step_checks, steps_ahead
from tests.conformance.components.adapters import submission
from tests.conformance.components.adapters.adapter import Adapter
from tests.conformance.components.adapters.names import SWAPPED
from tests.conformance.components.adapters.preparing import find_preparation
from tests.conformance.components.adapters.steps import Scheduled
from tests.conformance.components.bounds import CALL_SECONDS, Hang, bounded
from tests.conformance.components.contracts import CONTRACTS
from tests.conformance.components.loading import NotRecognised, loaded
from tests.conformance.components.request import Flight, Request
from tests.conformance.components.sizes import Setup
from tests.conformance.components.symbolic_cache import SymbolicCache, next_token, store_and_read

TEMPERATURES = (0.5, 1.0, 0.25)
JUNK_TOKEN = 61  # given to a sequence that must not take a token
# What a script is about may break these; another contract says nothing of the script's.
OUTCOMES = ("C16", "C17", "C20", "C21", "C22")
MOVES = "blocks that are swapped to the CPU"


class Broken(AssertionError):
    """A contract does not hold. contract: its id."""

    def __init__(self, contract: str, message: str) -> None:
        super().__init__(f"{contract}: {message}")
        self.contract = contract
        self.message = message


class Target:
    def __init__(self, path: str | Path, *, only: str = "", **sizes: Any) -> None:
        """path: a checkout. sizes: fields of Setup. Raises NotRecognised for what no adapter knows.

        only: the isolated contracts except this one raise nothing, if it is given.
        """
        self.setup = Setup(**sizes)
        self.adapter = Adapter(loaded(Path(path)), self.setup)
        self.requests: list[Request] = []
        self.cache = SymbolicCache(self.setup.num_blocks, self.setup.block_size)
        self.hit_contract = "C07" if self.setup.weak_hash else "C06"  # a block that is shared wrongly breaks it
        self.adapter.watch_moves(self._move)
        self.num_steps = 0
        self.admitted: list[Request] = []  # in the latest step
        self.ended_by: Broken | None = None  # of try_steps
        self.flight: Flight | None = None  # the step in front of the next one, if that is scheduled ahead
        self.call_seconds = CALL_SECONDS
        self.checked: Counter[str] = Counter()  # how often each contract was checked
        self.muted = {name for name in CONTRACTS if only and name != only}
        self.not_applicable: dict[str, str] = {}
        try:
            self.prepare = find_preparation(self.adapter)
        except NotRecognised as error:
            input_checks.skip_inputs(self, str(error))

    # --- what a script calls ---

    def add(
        self, tokens: list[int], max_tokens: int = 1, ignore_eos: bool = False, temperature: float | None = None
    ) -> Request:
        number = len(self.requests)
        temperature = TEMPERATURES[number % len(TEMPERATURES)] if temperature is None else temperature
        seq = submission.add(self.adapter, list(tokens), temperature, max_tokens, ignore_eos)
        # The token that a step computes anyway is the last one of a request that asked for none.
        request = Request(seq, list(tokens), max(max_tokens, 1), ignore_eos, temperature, number)
        self.requests.append(request)
        return request

    def try_add(self, tokens: list[int], **options: Any) -> Request | None:
        """add, for a request that the target may refuse: None then."""
        try:
            return self.add(tokens, **options)
        except Exception:
            return None

    def abort(self, number: int) -> None:
        request = self.requests[number]
        if request.is_finished:
            return
        name = self.adapter.abort_name
        if name is None:
            raise NotRecognised("the scheduler has no method to abort a request")
        self.guarded(lambda: getattr(self.adapter.scheduler, name)(request.seq.seq_id), name)
        request.is_finished = request.was_aborted = True
        if not self.is_ahead(request):
            step_checks.check_left(self, request, "C24")
        step_checks.check_blocks(self)

    def step(self, number: int = 1) -> None:
        for _ in range(number):
            if not self.live:
                return
            self.num_steps += 1
            if self.setup.is_async:
                steps_ahead.step(self)
                continue
            result, batch = self.choose(self.adapter.schedule, "schedule")
            if batch:
                steps_ahead.collect(self, self.submit(result, batch))

    def try_steps(self, number: int) -> None:
        """Steps of a script whose verdict is about what comes of it: an exception ends them, and expect() says it."""
        try:
            self.step(number)
        except Broken as error:
            if error.contract not in OUTCOMES:
                raise
            self.ended_by = error

    def finish(self, is_patient: bool = True) -> None:
        """Step until every request has ended, and check that the cache is whole again.

        is_patient: not if C17 is known to be broken, so that no time is spent on finding it again.
        """
        steps_per_token = 4 * len(self.requests) if is_patient else 1
        most = 20 + steps_per_token * sum(len(r.prompt) + r.max_tokens for r in self.requests)
        steps = 0
        self.check("C17")
        while self.live:
            self.step()
            steps += 1
            if steps > most:
                left = [request.number for request in self.live]
                self.broken("C17", f"after {steps} steps the requests {left} have not ended")
        steps_ahead.land(self)
        step_checks.check_whole(self)

    def expect_refused(
        self, contract: str, what: str, action: Callable[[], Any], kind: type[Exception] = ValueError
    ) -> None:
        self.check(contract)
        try:
            action()
        except kind:
            return
        except Exception as error:
            self.broken(contract, f"{what} raises {type(error).__name__}: {error}")
        self.broken(contract, f"{what} is accepted")

    def expect(self, contract: str, holds: bool, message: str) -> None:
        self.check(contract)
        if not holds:
            self.broken(contract, message)

    # --- how contracts report ---

    def check(self, contract: str) -> None:
        """Count that the contract is checked now."""
        self.checked[contract] += 1

    def broken(self, contract: str, message: str) -> None:
        """Raises NotRecognised where LLMEngine.add_request might refuse the request, and could not be asked."""
        if contract in self.muted and CONTRACTS[contract].is_isolated:
            return
        message += f" ({self.ended_by.message})" if self.ended_by is not None else ""
        if CONTRACTS[contract].is_admission and (reason := submission.no_submit(self.adapter)):
            raise NotRecognised(f"{message} by the scheduler; {reason}")
        raise Broken(contract, message)

    def skip(self, contract: str, reason: str) -> None:
        self.not_applicable.setdefault(contract, reason)

    def _move(self, is_out: bool, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            self.check(MOVES)
        self.cache.move(is_out, pairs)

    # --- one step ---

    @property
    def live(self) -> list[Request]:
        return [request for request in self.requests if not request.is_finished]

    def is_ahead(self, request: Request) -> bool:
        """Whether it takes part in the step in flight."""
        return self.flight is not None and any(request.seq is item.seq for item, _ in self.flight.rows)

    @property
    def holding(self) -> list[Request]:
        """The live requests, and those whose blocks a step in flight still writes to."""
        return [request for request in self.requests if not request.is_finished or self.is_ahead(request)]

    def request_of(self, seq: Any) -> Request:
        return next(request for request in self.requests if request.seq is seq)

    def guarded(self, action: Callable[[], Any], name: str, before: "step_checks.Before | None" = None) -> Any:
        self.check("C16")
        try:
            with bounded(self.call_seconds):
                return action()
        except Broken:
            raise
        except Hang as hang:
            self.broken("C16", f"{name}() {hang}")
        except Exception as error:
            if before is not None:
                step_checks.explain_failure(self, before, before.num_lost)
            self.broken("C16", f"{name}() raises {type(error).__name__}: {error}".rstrip(": "))

    def choose(self, schedule: Callable[[], Any], name: str) -> tuple[Any, list[Scheduled]]:
        """What the scheduler chooses as the next step, with the checks of it."""
        before, num_moves = step_checks.Before(self), self.checked[MOVES]
        result, batch = self.guarded(schedule, name, before)
        swapped = {id(seq) for seq in self.adapter.queue(SWAPPED)}
        for request in self.live:
            request.is_swapped = id(request.seq) in swapped
        if self.setup.is_async:
            batch = [steps_ahead.placed(self, item) for item in batch]
        step_checks.note_admissions(self, before, batch)
        if not batch:
            if self.flight is None:
                step_checks.explain_failure(self, before, step_checks.num_lost_blocks(self))
                if self.checked[MOVES] == num_moves:  # else the step is there for what it swaps
                    self.broken("C16", "schedule() returns nothing although a request is left")
            return result, batch
        for item in batch:
            if self.request_of(item.seq).is_finished:
                self.broken("C23", "a finished sequence is scheduled again")
        step_checks.check_schedule(self, before, batch)
        return result, batch

    def submit(self, result: Any, batch: list[Scheduled]) -> Flight:
        """Compute the step: what it reads and writes, and the tokens that come of it."""
        input_checks.check_inputs(self, result, batch)
        store_and_read(self, batch)
        rows = []
        for item in batch:
            request = self.request_of(item.seq)
            is_sampled = item.end == len(request.tokens)
            token = next_token(request.tokens) if is_sampled else JUNK_TOKEN
            rows.append((item, token))
            if is_sampled and not request.has_ended_ahead:
                request.output.append(token)
                request.num_in_flight += 1
        return Flight(result, rows)
