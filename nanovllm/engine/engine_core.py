"""EngineCore: the step loop. Schedules a step, lets the executor compute it, and processes its tokens."""

from nanovllm.engine.request_registry import RequestOwner, RequestRegistry
from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.executor.base import Executor, PendingTokens


class EngineCore:
    """Scheduler, executor and the requests of one engine. The caller holds the engine's lock.

    async_scheduling: whether a step is started before the tokens of the one before it are known.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, async_scheduling: bool) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.requests = RequestRegistry()
        self._async_scheduling = async_scheduling
        self._ahead: PendingTokens | None = None  # of the step after the current one
        self._is_in_step = False
        self._closed_message = "this engine is closed: make a new one"

    def enqueue(self, request: RequestState, owner: RequestOwner) -> None:
        self.check_open()
        self.scheduler.add(request.sequence)
        self.requests.add(request, owner)

    def remove_ended(self) -> None:
        """Remove the requests of generate calls that have ended; abort the unfinished ones."""
        self.requests.remove_ended(self.scheduler.abort)

    # --- one step ---

    def advance(self, caller: RequestOwner) -> ScheduledBatch:
        """Schedule, compute and process one step. With async_scheduling, the next step is started meanwhile.

        Raises RuntimeError within a step of the same thread: its scheduler may be in the middle of a change.
        """
        self.check_open()
        if self._is_in_step:
            raise RuntimeError(
                "a step cannot be computed within a step: do not call generate or step in a signal handler"
            )
        self._is_in_step = True
        try:
            return self._advance(caller)
        finally:
            self._is_in_step = False

    def _advance(self, caller: RequestOwner) -> ScheduledBatch:
        self.remove_ended()
        pending, batch = self._next_batch()
        if batch.is_empty:
            if not self.scheduler.is_finished:
                raise RuntimeError("nothing can be scheduled although requests wait: please report this as a bug")
            return batch
        is_computed = False
        try:
            token_ids = self._execute(batch, pending)
            is_computed = True
            self.scheduler.postprocess(batch, token_ids, self.requests.process_new_token)
            self.requests.add_updates(batch.sampled_sequences)
        except BaseException as error:
            self._end_failed_step(batch, error, caller, is_computed)
            raise
        return batch

    def _next_batch(self) -> tuple[PendingTokens | None, ScheduledBatch]:
        """The current step, and its pending tokens if it has been submitted."""
        pending, self._ahead = self._ahead, None
        if pending is not None:
            batch = self.scheduler.commit_async_batch(pending.batch)
            if not batch.is_empty:
                return pending, batch
        return None, self.scheduler.schedule()

    def _execute(self, batch: ScheduledBatch, pending: PendingTokens | None) -> list[int]:
        """The new tokens of `batch`. With async_scheduling, the next step is submitted before waiting for them, if it
        can be scheduled without them.
        """
        pending = pending or self.executor.execute(batch)
        ahead = self.scheduler.schedule_next_async(batch) if self._async_scheduling else None
        if ahead is not None:
            self._ahead = self.executor.execute(ahead, pending)
        tokens = dict(zip(pending.batch.sampled_sequences, pending.token_ids(), strict=True))
        return [tokens[seq] for seq in batch.sampled_sequences]  # sequences that have finished meanwhile are left out

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
            self._closed_message += f", since a step failed: {_one_line(error)}"
        self.scheduler.preempt_failed(batch)

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


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
