"""RequestRegistry: the requests in an engine, and the caller that owns each of them."""

from collections import deque
from collections.abc import Callable, Iterable

from nanovllm.engine.request_state import RequestState
from nanovllm.engine.sequence import FinishCause, Sequence

_ABORT = FinishCause.ABORT  # looking up an Enum's member takes longer than the rest of a loop over sequences


class RequestOwner:
    """The caller that gets the outputs of some requests: step() those of add_request, a call of generate its own.

    A step computes requests of several owners, and when it fails, only the caller that computed it gets the exception.
    If another owner's requests are lost, its error is set, and raised at its next call.
    remedy: what to do then. requests: of a call of generate or generate_stream, in the order of the prompts. updated:
    those of them with tokens since take_updates; a dict as an ordered set.
    """

    def __init__(self, remedy: str, requests: list[RequestState]) -> None:
        self.remedy = remedy
        self.requests = requests
        self.updated: dict[RequestState, None] = {}
        self.error = ""
        self._unfinished = requests[::-1]

    def raise_error(self) -> None:
        """Raise RuntimeError once, if there is an error."""
        if self.error:
            error, self.error = self.error, ""
            raise RuntimeError(error)

    @property
    def is_finished(self) -> bool:
        """Whether all requests have finished and all updates have been taken."""
        while self._unfinished and self._unfinished[-1].sequence.is_finished:
            self._unfinished.pop()
        return not self._unfinished and not self.updated

    def take_updates(self) -> list[RequestState]:
        """The requests with tokens since the last call, without aborted ones."""
        updated = [request for request in self.updated if request.sequence.finish_cause is not _ABORT]
        self.updated.clear()
        return updated


class RequestRegistry:
    """All requests in the engine, in order of arrival. The engine's lock guards every method except end_call."""

    def __init__(self) -> None:
        self.step_owner = RequestOwner("add the requests again", [])
        self._requests: dict[int, RequestState] = {}  # by seq_id
        self._calls: dict[int, RequestOwner] = {}  # by seq_id of their requests; step_owner owns all others
        self._ended: deque[RequestState] = deque()  # requests of calls that have ended

    @property
    def is_empty(self) -> bool:
        return not self._requests

    def add(self, request: RequestState, owner: RequestOwner) -> None:
        self._requests[request.sequence.seq_id] = request
        if owner is not self.step_owner:
            self._calls[request.sequence.seq_id] = owner

    def owner_of(self, seq: Sequence) -> RequestOwner | None:
        """None if the request has left the engine."""
        return self._calls.get(seq.seq_id, self.step_owner) if seq.seq_id in self._requests else None

    def process_new_token(self, seq: Sequence) -> bool:
        return self._requests[seq.seq_id].process_new_token()

    def add_updates(self, sampled_sequences: Iterable[Sequence]) -> None:
        """Inform the calls of their requests' new tokens. A sequence that was aborted during the step has got none."""
        for seq in sampled_sequences if self._calls else ():
            call = self._calls.get(seq.seq_id)
            if call is not None and seq.finish_cause is not _ABORT:
                call.updated[self._requests[seq.seq_id]] = None

    def pop_finished(self) -> list[RequestState]:
        """Remove and return the finished requests of step_owner."""
        finished = [
            request
            for seq_id, request in self._requests.items()
            if request.sequence.finish_cause is not None and seq_id not in self._calls
        ]
        for request in finished:
            del self._requests[request.sequence.seq_id]
        return finished

    def end_call(self, call: RequestOwner) -> None:
        """Note that `call` has ended. Needs no lock: the garbage collector may run this in any thread at any time."""
        self._ended.extend(call.requests)

    def remove_ended(self, abort: Callable[[int], bool]) -> None:
        """Remove the requests of calls that have ended; `abort` gets the seq_id of each unfinished one."""
        while self._ended:
            seq = self._ended.popleft().sequence
            if not seq.is_finished:
                abort(seq.seq_id)
            self._requests.pop(seq.seq_id, None)
            self._calls.pop(seq.seq_id, None)

    def lose_all(self, error: str) -> None:
        """Remove all requests. Owners of unfinished ones get `error`."""
        for seq_id, request in self._requests.items():
            if not request.sequence.is_finished:
                self._calls.get(seq_id, self.step_owner).error = error
        self._requests.clear()
        self._calls.clear()
