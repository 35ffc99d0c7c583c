"""EngineCore: what callers are told of a step that failed, with an executor that computes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.engine.engine_core import EngineCore
from nanovllm.engine.request_registry import RequestOwner
from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.token_decoder import TokenDecoder
from tests.support.scheduling import make_scheduler, make_sequence
from tests.unit.engine.test_detokenizer import ByteTokenizer


class ScriptedExecutor:
    """Each step samples the letter "a", or raises `error`, which closes it as an executor of several ranks."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.is_closed = error, False

    def execute(self, batch: ScheduledBatch) -> Any:
        if self.error is not None:
            self.close()
            raise self.error
        return SimpleNamespace(batch=batch, token_ids=lambda: [ord("a")] * len(batch.sampled_sequences))

    def close(self) -> None:
        self.is_closed = True


def make_core(executor: Any) -> EngineCore:
    return EngineCore(make_scheduler(), executor, async_scheduling=False)


def test_an_engine_that_a_step_has_closed_names_the_cause_in_one_line() -> None:
    core = make_core(ScriptedExecutor(OSError("a cable was pulled\nTraceback of rank 1")))
    step_owner = core.requests.step_owner
    core.enqueue(RequestState(make_sequence([1]), None), step_owner)
    with pytest.raises(OSError, match="a cable was pulled"):
        core.advance(step_owner)
    for use in (core.check_open, lambda: core.advance(step_owner)):
        with pytest.raises(
            RuntimeError, match=r"^this engine is closed: make a new one, since .*: OSError: a .* pulled$"
        ):
            use()


def test_a_signal_handler_that_closes_the_engine_within_a_step_tells_only_the_requests_owners(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core(ScriptedExecutor())
    request = RequestState(make_sequence([1], stop="END"), TokenDecoder(ByteTokenizer()))
    core.enqueue(request, call := RequestOwner("", [request]))

    def close(self: RequestState) -> bool:
        core.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(RequestState, "process_new_token", close)
    with pytest.raises(KeyboardInterrupt):
        core.advance(call)
    core.requests.step_owner.raise_error()  # it had no request, so there is nothing to raise
    with pytest.raises(RuntimeError, match=r"^this engine is closed: make a new one$"):
        call.raise_error()


def test_a_signal_handler_within_a_step_cannot_compute_another() -> None:
    """The scheduler may be in the middle of a change. The step's own caller gets the error, and the engine goes on."""
    executor = ScriptedExecutor()
    core = make_core(executor)
    step_owner = core.requests.step_owner
    core.enqueue(RequestState(make_sequence([1]), None), step_owner)
    execute = executor.execute
    executor.execute = lambda batch: core.advance(step_owner)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"^a step cannot be computed within a step: do not call generate or step"):
        core.advance(step_owner)
    executor.execute = execute  # type: ignore[method-assign]
    core.enqueue(RequestState(make_sequence([1]), None), step_owner)
    assert core.advance(step_owner).num_tokens == 1
