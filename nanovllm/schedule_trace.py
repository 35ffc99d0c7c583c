"""ScheduleTrace: what a Scheduler decided in each step. A recording wraps the methods of one Scheduler.

with recording(llm.scheduler) as trace:
    llm.generate(prompts)
print(trace.steps[0].computed)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import FinishCause, Sequence
from nanovllm.outputs import FinishReason


@dataclass
class TracedStep:
    """One step of the engine. Sequences are given by seq_id; queues and blocks are those while the step is computed.

    computed: the position of the first token that the step computes, and the number of tokens.
    admitted: number of tokens whose keys and values were found in the prefix cache, of each sequence that left the
        waiting queue in this step.
    preempted: in this order; they have lost their blocks and wait again.
    block_tables: of the running sequences.
    cached_blocks: ids of the blocks that no sequence owns and that are in the prefix cache.
    num_evictions: blocks that left the prefix cache since the step before.
    finished: sequences that ended on the step's tokens, or were aborted before the next step.
    """

    is_prefill: bool
    computed: dict[int, tuple[int, int]]
    running: tuple[int, ...]
    waiting: tuple[int, ...]
    admitted: dict[int, int]
    preempted: tuple[int, ...]
    block_tables: dict[int, tuple[int, ...]]
    cached_blocks: frozenset[int]
    num_evictions: int
    finished: dict[int, FinishReason] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(number for _, number in self.computed.values())

    @property
    def num_owned_blocks(self) -> int:
        """A block that several sequences share counts once."""
        return len({block_id for table in self.block_tables.values() for block_id in table})


@dataclass
class ScheduleTrace:
    """The steps of one Scheduler, whose pool has num_blocks blocks of block_size tokens."""

    num_blocks: int
    block_size: int
    steps: list[TracedStep] = field(default_factory=list)

    @property
    def num_preemptions(self) -> int:
        return sum(len(step.preempted) for step in self.steps)

    @property
    def num_hit_tokens(self) -> int:
        """Tokens found in the prefix cache, those of preempted sequences among them."""
        return sum(sum(step.admitted.values()) for step in self.steps)

    @property
    def seq_ids(self) -> list[int]:
        """In order of arrival."""
        return sorted({seq_id for step in self.steps for seq_id in (*step.running, *step.waiting)})


@contextmanager
def recording(scheduler: Scheduler) -> Iterator[ScheduleTrace]:
    """Record the steps that are scheduled within the block. Wraps methods of this Scheduler until the block ends."""
    recorder = _Recorder(scheduler)
    names = ("schedule", "commit_async_batch", "preempt", "finish")
    for name in names:
        setattr(scheduler, name, getattr(recorder, name))
    try:
        yield recorder.trace
    finally:
        for name in names:
            delattr(scheduler, name)


class _Recorder:
    """Calls the methods of `scheduler` and notes what they did."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.block_manager
        self._schedule = scheduler.schedule
        self._commit_async_batch = scheduler.commit_async_batch
        self._preempt = scheduler.preempt
        self._finish = scheduler.finish
        self._was_running = {seq.seq_id for seq in scheduler.running}
        self._preempted: list[int] = []
        self._num_evictions = self._manager.num_evictions
        self.trace = ScheduleTrace(len(self._manager.blocks), self._manager.block_size)

    def schedule(self) -> ScheduledBatch:
        return self._add_step(self._schedule())

    def commit_async_batch(self, async_batch: ScheduledBatch) -> ScheduledBatch:
        return self._add_step(self._commit_async_batch(async_batch))

    def preempt(self, seq: Sequence) -> None:
        self._preempt(seq)
        self._preempted.append(seq.seq_id)
        self._was_running.discard(seq.seq_id)

    def finish(self, seq: Sequence, cause: FinishCause) -> None:
        self._finish(seq, cause)
        if self.trace.steps:
            self.trace.steps[-1].finished[seq.seq_id] = cause.reason

    def _add_step(self, batch: ScheduledBatch) -> ScheduledBatch:
        if batch.is_empty:
            return batch
        running = self._scheduler.running
        tables = {seq.seq_id: tuple(seq.block_table) for seq in running}
        cached = (block_id for block_ids in self._manager.hash_to_block_ids.values() for block_id in block_ids)
        num_evictions = self._manager.num_evictions
        step = TracedStep(
            is_prefill=batch.is_prefill,
            computed={seq.seq_id: (seq.num_cached_tokens, seq.num_scheduled_tokens) for seq in batch.sequences},
            running=tuple(tables),
            waiting=tuple(seq.seq_id for seq in self._scheduler.waiting),
            admitted={seq.seq_id: seq.num_cached_tokens for seq in running if seq.seq_id not in self._was_running},
            preempted=tuple(self._preempted),
            block_tables=tables,
            cached_blocks=frozenset(block_id for block_id in cached if not self._manager.blocks[block_id].ref_count),
            num_evictions=num_evictions - self._num_evictions,
        )
        self._was_running, self._preempted, self._num_evictions = set(tables), [], num_evictions
        self.trace.steps.append(step)
        return batch
