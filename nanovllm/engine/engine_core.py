"""EngineCore: the step loop. Schedules a step, lets the executor compute it, and processes its tokens."""

from typing import Any

from nanovllm.engine.request_registry import RequestOwner, RequestRegistry
from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import SequenceStatus


class EngineCore:
    """Scheduler, executor and the requests of one engine. The caller holds the engine's lock.

    async_scheduling: whether a step is started before the tokens of the one before it are known.
    """

    def __init__(self, scheduler: Scheduler, executor: Any, async_scheduling: bool) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.requests = RequestRegistry()
        self._async_scheduling = async_scheduling
        self._ahead: Any = None  # AsyncModelOutput of the step after the current one
        self._why_closed = ""

    def enqueue(self, request: RequestState, owner: RequestOwner) -> None:
        self.check_open()
        self.scheduler.add(request.sequence)
        self.requests.add(request, owner)

    def remove_ended(self) -> None:
        """Remove the requests of generate calls that have ended; abort the unfinished ones."""
        self.requests.remove_ended(self.scheduler.abort)

    # --- one step ---

    def advance(self, caller: RequestOwner) -> ScheduledBatch:
        """Schedule, compute and process one step. With async_scheduling, the next step is started meanwhile."""
        self.check_open()
        self.remove_ended()
        launched, batch = self._next_batch()
        if batch.is_empty:
            if not self.scheduler.is_finished:
                raise RuntimeError("nothing can be scheduled although requests wait: please report this as a bug")
            return batch
        is_computed = False
        try:
            token_ids = self._execute_async(batch, launched) if self._async_scheduling else self.executor.run(batch)
            is_computed = True
            self._process_tokens(batch, token_ids)
        except BaseException as error:
            self._end_failed_step(batch, error, caller, is_computed)
            raise
        return batch

    def _next_batch(self) -> tuple[Any, ScheduledBatch]:
        """The current step, and its AsyncModelOutput if it has been started."""
        launched, self._ahead = self._ahead, None
        if launched is not None:
            batch = self.scheduler.commit_async_batch(launched.batch)
            if not batch.is_empty:
                return launched, batch
        return None, self.scheduler.schedule()

    def _execute_async(self, batch: ScheduledBatch, launched: Any) -> list[int]:
        """The new tokens of `batch`. Before waiting for them, start the next step if it does not depend on them."""
        launched = launched or self.executor.launch(batch)
        ahead = self.scheduler.schedule_next_async(batch)
        if ahead is not None:
            self._ahead = self.executor.launch(ahead, launched)
        tokens = dict(zip(launched.batch.sampled_sequences, launched.token_ids(), strict=True))
        return [tokens[seq] for seq in batch.sampled_sequences]  # sequences that have finished meanwhile are left out

    def _process_tokens(self, batch: ScheduledBatch, token_ids: list[int]) -> None:
        """Append the new tokens, finish the sequences that they end, and inform the owners."""
        self.scheduler.postprocess(batch, token_ids, self.requests.process_new_token)
        self.requests.add_updates(batch.sampled_sequences)

    def _end_failed_step(
        self, batch: ScheduledBatch, error: BaseException, caller: RequestOwner, is_computed: bool
    ) -> None:
        """Abort the requests of `caller`. The other requests of the step are computed again.

        If the tokens were computed and not all processed, the text of another owner's request may lack its token:
        such a request is aborted, and its owner gets an error.
        """
        for seq in batch.sequences:
            owner = self.requests.owner_of(seq)
            if owner is None or owner is caller:
                self.scheduler.abort(seq.seq_id)
            elif is_computed and seq in batch.sampled_sequences:
                self.scheduler.abort(seq.seq_id)
                owner.error = f"a step of another call failed: {_one_line(error)}; {owner.remedy}"
        if self.executor.is_closed:
            self._why_closed = f", since a step failed: {_one_line(error)}"
        while any(seq.status is SequenceStatus.RUNNING for seq in batch.sequences):
            self.scheduler.preempt(self.scheduler.running[-1])  # the last one first, to keep the order of arrival

    # --- close ---

    def check_open(self) -> None:
        if self.executor.is_closed:
            raise RuntimeError(self._closed_message)

    def close(self) -> None:
        """Abort all requests and close the executor. May be called twice."""
        self.requests.lose_all(self._closed_message)
        for seq in (*self.scheduler.running, *self.scheduler.waiting):
            self.scheduler.abort(seq.seq_id)
        self._ahead = None
        if not self.executor.is_closed:
            self.executor.close()

    @property
    def _closed_message(self) -> str:
        return f"this engine is closed: make a new one{self._why_closed}"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
