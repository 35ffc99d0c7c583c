"""Async scheduling: a step is scheduled, and computed, before the tokens of the step in front of it are known.

Two shapes are followed, and one step is in flight. Either schedule() is called again and each token in flight is a
placeholder of its sequence (vLLM's AsyncScheduler); or a method is given the step in front and returns the next one,
and another drops what has ended meanwhile (this project's Scheduler). The device computes steps in the order in which
they were submitted. A request that ends by a token in flight is computed one step too far: that token is discarded.
"""

from typing import Any

from tests.conformance.components import step_checks
from tests.conformance.components.adapters.names import NEXT_STEP
from tests.conformance.components.adapters.steps import Scheduled, have_placeholders, postprocess
from tests.conformance.components.request import Flight


def placed(target: Any, item: Scheduled) -> Scheduled:
    """A decode row computes the last token of its sequence, which may be in flight."""
    request, is_behind = target.request_of(item.seq), target.flight is not None
    if item.is_prefill:
        return item._replace(is_behind=is_behind)
    is_in_flight = request.num_in_flight > 0
    return Scheduled(item.seq, len(request.tokens) - 1, 1, False, is_behind, is_in_flight)


def step(target: Any) -> None:
    """Schedule and submit a step, and then collect the tokens of the step in front of it."""
    if target.adapter.runs_behind:
        _step_behind(target)
    else:
        _step_with_placeholders(target)


def _step_with_placeholders(target: Any) -> None:
    front = target.flight
    result, batch = target.choose(target.adapter.schedule, "schedule")
    is_ahead = have_placeholders(batch)
    target.flight = target.submit(result, batch) if is_ahead else None
    if front is not None:
        collect(target, front)
    rows = [item for item in batch if not target.request_of(item.seq).is_finished]
    if rows and not is_ahead:  # its tokens must be known before the next schedule()
        collect(target, target.submit(result, rows))


def _step_behind(target: Any) -> None:
    front, target.flight = _committed(target), None
    if front is None:
        result, batch = target.choose(target.adapter.schedule, "schedule")
        if not batch:
            return
        front = target.submit(result, batch)
    target.flight = front
    result, batch = target.choose(lambda: target.adapter.schedule_next(front.result), NEXT_STEP)
    target.flight = target.submit(result, batch) if batch else None
    collect(target, front)


def _committed(target: Any) -> Flight | None:
    """The step in flight without the rows that have ended meanwhile, or None."""
    flight = target.flight
    if flight is None:
        return None
    flight.result, left = target.guarded(lambda: target.adapter.commit(flight.result), "commit")
    rows, flight.rows = flight.rows, [row for row in flight.rows if any(row[0].seq is seq for seq in left)]
    for row in rows:
        request = target.request_of(row[0].seq)
        if request.is_finished:
            target.check("C43" if request.was_aborted else "C42")
        elif row not in flight.rows:
            target.broken("C20", f"request {request.number} goes on, and its row of the step ahead is dropped")
    return flight if flight.rows else None


def land(target: Any) -> None:
    """Collect the step in flight, whose rows have all ended."""
    flight = _committed(target) if target.adapter.runs_behind else target.flight
    target.flight = None
    if flight is not None:
        collect(target, flight)


def collect(target: Any, flight: Flight) -> None:
    """Give the scheduler the tokens of a step, and check what it does with them: C41, C42 and C43 first."""
    batch, tokens = [item for item, _ in flight.rows], [token for _, token in flight.rows]
    requests = [target.request_of(item.seq) for item in batch]
    ended = [(request, len(request.seq)) for request in requests if request.is_finished]
    caught = [(request, len(request.seq)) for request in requests if not request.table]
    live = [(item, request) for item, request in zip(batch, requests, strict=True) if not request.is_finished]
    target.guarded(lambda: postprocess(target.adapter, flight.result, batch, tokens), "postprocess")
    for request, length in ended if target.setup.is_async else ():
        contract = "C43" if request.was_aborted else "C42"
        what = f"request {request.number} has ended, and gets one token more"
        target.expect(contract, len(request.seq) == length, what)
        step_checks.check_left(target, request, "C24" if request.was_aborted else "C23")
    for request, length in caught:
        if not request.is_finished and request.num_in_flight and len(request.seq) == length:
            request.output.pop()  # discarded, and computed again
            request.num_in_flight = 0
    for item, request in live:
        if item.end == len(request.tokens) - request.num_in_flight:
            request.num_in_flight -= request.num_in_flight > 0
    if target.setup.is_async:
        _check_entries(target)
    step_checks.check_tokens(target, [request for _, request in live])


def _check_entries(target: Any) -> None:
    """C41: what the prefix cache says of a block is what its written slots hold."""
    size = target.setup.block_size
    for block_id, tokens in target.adapter.cache_entries().items():
        for offset, slot in enumerate(target.cache.slots[block_id * size : (block_id + 1) * size]):
            if slot is None:
                continue
            target.check("C41")
            if slot[1:2] != tuple(tokens[offset : offset + 1]):
                said = tokens[offset] if offset < len(tokens) else "nothing"
                target.broken("C41", f"slot {offset} of block {block_id} holds {slot[1]}, the prefix cache says {said}")
