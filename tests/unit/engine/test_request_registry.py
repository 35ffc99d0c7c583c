"""RequestRegistry: what is left of calls that have ended. test_engine_core.py and tests/e2e test the outputs."""

import weakref

from nanovllm.engine.request_registry import RequestOwner, RequestRegistry
from nanovllm.engine.request_state import RequestState
from tests.support.scheduling import make_sequence


def test_a_call_that_has_ended_leaves_nothing_behind() -> None:
    """A server ends a call for each request: what stays of each fills the memory."""
    registry = RequestRegistry()
    request = RequestState(make_sequence([1]), None)
    registry.add(request, call := RequestOwner("call generate again", [request]))
    registry.end_call(call)
    registry.remove_ended(abort=lambda seq_id: True)
    left = [weakref.ref(request), weakref.ref(call)]
    del request, call
    assert [reference() for reference in left] == [None, None]
