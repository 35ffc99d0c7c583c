"""Scheduler: chooses the sequences of each step, and takes in the tokens that the step has computed.

Prefill has priority: a step computes prompts if any fit, and otherwise one token of each running sequence. Requests are
served in order of arrival: the running queue followed by the waiting queue is always in that order, and the sequence
that was admitted last is preempted first. It is one file because all of it changes the same two queues.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.finish_check import finish_cause, has_full_length
from nanovllm.engine.sequence import FinishCause, Sequence, SequenceStatus

MAX_CONSECUTIVE_PREFILLS = 8


@dataclass(frozen=True)
class ScheduledBatch:
    """The work of one step: num_scheduled_tokens[i] tokens of sequences[i].

    sampled_sequences: the sequences that get a new token; the others are prompts with chunks left for later steps.
    """

    is_prefill: bool
    sequences: tuple[Sequence, ...]
    num_scheduled_tokens: tuple[int, ...]
    sampled_sequences: tuple[Sequence, ...]

    @property
    def is_empty(self) -> bool:
        return not self.sequences

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)


class Scheduler:
    """Waiting and running queue, token budget and preemption.

    A running sequence that could decode waits for at most MAX_CONSECUTIVE_PREFILLS prefill steps in a row.
    Admission leaves one free block for each running sequence that can still outgrow its last block. So a sequence
    takes part in at least block_size decode steps between its admission and its preemption.
    max_supported_len: the largest max_model_len of this model, for the remedy in errors.
    num_preemptions, num_prefill_chunks: counted since construction; a chunk is a prefill that leaves tokens of its
        prompt for later steps.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_supported_len: int | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_supported_len = max_model_len if max_supported_len is None else max_supported_len
        self.eos_token_ids = eos_token_ids
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self.num_preemptions = 0
        self.num_prefill_chunks = 0
        self._num_consecutive_prefills = 0
        self._cached_early: ScheduledBatch | None = None  # a prefill that was counted as computed when it was submitted

    @property
    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    # --- admission ---

    def validate_request(self, seq: Sequence) -> None:
        """Raise ValueError when `seq` can never finish: longer than max_model_len, or than the whole KV cache."""
        num_prompt_tokens, max_tokens = seq.num_prompt_tokens, seq.sampling_params.max_tokens
        if num_prompt_tokens >= self.max_model_len:
            raise ValueError(
                f"a prompt must be shorter than max_model_len={self.max_model_len} tokens to leave room for one more, "
                f"got {num_prompt_tokens}; {self._remedy_for_length(num_prompt_tokens)}"
            )
        num_blocks, block_size = len(self.block_manager.blocks), self.block_manager.block_size
        if self._max_num_blocks(seq) > num_blocks:
            raise ValueError(
                f"prompt and output must fit in the KV cache of {num_blocks} blocks of {block_size} tokens, got "
                f"{num_prompt_tokens} prompt tokens and max_tokens={max_tokens} (max_model_len={self.max_model_len}), "
                f"which take {self._max_num_blocks(seq)} blocks; {self._remedy_for_cache(seq)}"
            )

    def _remedy_for_length(self, num_prompt_tokens: int) -> str:
        if num_prompt_tokens < self.max_supported_len:
            return f"shorten it, or set max_model_len to at least {num_prompt_tokens + 1}"
        return f"shorten it: this model takes at most {self.max_supported_len} tokens, prompt and output together"

    def _remedy_for_cache(self, seq: Sequence) -> str:
        num_slots = len(self.block_manager.blocks) * self.block_manager.block_size
        max_tokens = num_slots + 1 - seq.num_prompt_tokens  # the last token's key and value are never stored
        shorter = (
            f"lower max_tokens to {max_tokens}"
            if max_tokens >= 1
            else f"shorten the prompt to {num_slots} tokens and set max_tokens to 1"
        )
        return f"{shorter}, or set num_kv_cache_blocks to at least {self._max_num_blocks(seq)}"

    def add(self, seq: Sequence) -> None:
        """Queue `seq`. Raises the errors of validate_request."""
        self.validate_request(seq)
        self.waiting.append(seq)

    def _max_num_blocks(self, seq: Sequence) -> int:
        """Blocks of `seq` at its greatest length; the last token's key and value are never stored."""
        num_tokens = min(seq.num_prompt_tokens + seq.sampling_params.max_tokens, self.max_model_len) - 1
        return -(-num_tokens // self.block_manager.block_size)

    # --- one step ---

    def schedule(self) -> ScheduledBatch:
        """Choose the next step, allocate its blocks, set num_scheduled_tokens. Empty if no request is queued."""
        is_decode_due = self._num_consecutive_prefills >= MAX_CONSECUTIVE_PREFILLS
        if not (is_decode_due and any(seq.is_decodable for seq in self.running)):
            prefill = self._schedule_prefill()
            if prefill is not None:
                return prefill
        self._num_consecutive_prefills = 0
        return self._batch(self._schedule_decode(), is_prefill=False)

    def _batch(self, sequences: list[Sequence], is_prefill: bool) -> ScheduledBatch:
        return ScheduledBatch(
            is_prefill,
            tuple(sequences),
            tuple(seq.num_scheduled_tokens for seq in sequences),
            tuple(seq for seq in sequences if seq.is_sampled),
        )

    def _schedule_prefill(self) -> ScheduledBatch | None:
        budget = self.max_num_batched_tokens
        scheduled: list[Sequence] = []

        def schedule_chunk(seq: Sequence) -> None:
            nonlocal budget
            seq.num_scheduled_tokens = min(seq.num_uncached_tokens, budget)
            budget -= seq.num_scheduled_tokens
            self.num_prefill_chunks += not seq.is_sampled
            scheduled.append(seq)

        for seq in self.running:
            if budget and seq.num_uncached_tokens > 1:
                schedule_chunk(seq)
        while budget and self._can_admit():
            seq = self.waiting.popleft()
            self.block_manager.allocate(seq)
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            schedule_chunk(seq)
        if not scheduled:
            return None
        self._num_consecutive_prefills += 1
        return self._batch(scheduled, is_prefill=True)

    def _can_admit(self) -> bool:
        """Whether the first waiting sequence, if any, can run now."""
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return False
        seq = self.waiting[0]
        return self.block_manager.can_allocate(seq, self._num_reserved_blocks(seq))

    def _num_reserved_blocks(self, candidate: Sequence) -> int:
        """Blocks that stay free when `candidate` is admitted: one for each sequence that can outgrow its blocks.

        Zero if nothing is running: admission control guarantees that a single sequence fits in the cache.
        """
        if not self.running:
            return 0
        num_growing = sum(self._max_num_blocks(seq) > len(seq.block_table) for seq in self.running)
        return num_growing + (self._max_num_blocks(candidate) > candidate.num_blocks)

    def _schedule_decode(self) -> list[Sequence]:
        scheduled: list[Sequence] = []
        for seq in tuple(self.running):
            if seq.status is not SequenceStatus.RUNNING or not seq.is_decodable:
                continue
            while not self.block_manager.can_append(seq):
                lowest = self.running[-1]
                self.preempt(lowest)
                if lowest is seq:
                    break
            else:
                self.block_manager.append(seq)
                seq.num_scheduled_tokens = 1
                scheduled.append(seq)
        return scheduled

    def preempt(self, seq: Sequence) -> None:
        """Free the blocks of a running sequence and move it to the front of the waiting queue. It keeps its tokens."""
        self.running.remove(seq)
        self.block_manager.deallocate(seq)
        seq.num_scheduled_tokens = 0
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def postprocess(
        self,
        batch: ScheduledBatch,
        token_ids: list[int],
        completes_stop_string: Callable[[Sequence], bool] = lambda seq: False,
    ) -> None:
        """Take in a computed batch: token_ids[i] is the new token of batch.sampled_sequences[i].

        Caches the blocks that became full, appends the tokens, finishes the sequences that they end. Sequences that
        were aborted since schedule() are skipped.
        completes_stop_string: whether the last token of a sequence completes one of its stop strings.
        """
        if batch is not self._cached_early:
            self._cache_computed(batch)
        self._cached_early = None
        for seq, token_id in zip(batch.sampled_sequences, token_ids, strict=True):
            if seq.is_finished:
                continue
            seq.append_token(token_id)
            cause = finish_cause(
                seq,
                eos_token_ids=self.eos_token_ids,
                max_model_len=self.max_model_len,
                completes_stop_string=completes_stop_string,
            )
            if cause is not None:
                self.finish(seq, cause)

    def _cache_computed(self, batch: ScheduledBatch) -> None:
        """Count the scheduled tokens of `batch` as computed, and enter the blocks that they fill into the cache."""
        for seq in batch.sequences:
            if not seq.is_finished:
                seq.num_cached_tokens += seq.num_scheduled_tokens
                seq.num_tokens_with_kv = max(seq.num_tokens_with_kv, seq.num_cached_tokens)
                seq.num_scheduled_tokens = 0
                self.block_manager.cache_full_blocks(seq)

    # --- async scheduling ---

    def schedule_next_async(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """The step after `batch`, which has been submitted and not postprocessed. Allocates its blocks.

        The tokens of `batch` are not known yet. After a prefill it may be another prefill, which does not need them.
        In a decode step, a sequence that finishes on one of them is computed one extra, discarded step.
        Returns None where schedule() may choose another step: when a prompt has tokens left or a waiting sequence can
        be admitted after a decode step, when `batch` ends a sequence by length while another waits, when blocks are
        short, and when no sequence is left to decode.
        Call postprocess(batch) and then commit_async_batch; schedule() must not be called in between.
        """
        if batch.is_prefill and (prefill := self._schedule_next_prefill(batch)) is not None:
            return prefill
        sampled = set(batch.sampled_sequences)
        sequences: list[Sequence] = []
        for seq in self.running:
            num_tokens = seq.num_tokens + (seq in sampled)
            if num_tokens - seq.num_cached_tokens_after_step != 1:
                return None
            if seq not in sampled or not has_full_length(seq, num_tokens, self.max_model_len):
                sequences.append(seq)
        if self.waiting and (len(sequences) < len(self.running) or self._can_admit()):
            return None
        block_size = self.block_manager.block_size
        outgrown = [seq for seq in sequences if seq.num_cached_tokens_after_step == len(seq.block_table) * block_size]
        if not sequences or len(outgrown) > self.block_manager.num_free_blocks:
            return None
        for seq in outgrown:
            self.block_manager.append_block(seq)
        self._num_consecutive_prefills = 0
        return ScheduledBatch(
            is_prefill=False,
            sequences=tuple(sequences),
            num_scheduled_tokens=(1,) * len(sequences),
            sampled_sequences=tuple(sequences),
        )

    def _schedule_next_prefill(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """The prefill after the prefill `batch`, if it does not depend on the tokens of `batch`.

        The blocks that `batch` fills are entered into the prefix cache before it has computed them. The device computes
        steps in the order of their submission, so a sequence of a later step may share these blocks.
        """
        ends = any(has_full_length(seq, seq.num_tokens + 1, self.max_model_len) for seq in batch.sampled_sequences)
        if ends or self._num_consecutive_prefills >= MAX_CONSECUTIVE_PREFILLS:
            return None
        self._cache_computed(batch)
        self._cached_early = batch
        return self._schedule_prefill()

    def commit_async_batch(self, async_batch: ScheduledBatch) -> ScheduledBatch:
        """The step that schedule_next_async chose, without the sequences that no longer run. May be empty."""
        sequences = [seq for seq in async_batch.sequences if seq.status is SequenceStatus.RUNNING]
        if not async_batch.is_prefill:
            for seq in sequences:
                seq.num_scheduled_tokens = 1
        return self._batch(sequences, async_batch.is_prefill)

    def preempt_failed(self, batch: ScheduledBatch) -> None:
        """Preempt the sequences of `batch`, which was not computed, and of a step that was scheduled after it."""
        while any(seq in batch.sequences or seq.num_scheduled_tokens for seq in self.running):
            self.preempt(self.running[-1])  # the last one first, to keep the order of arrival
        if self._cached_early is not None:
            self.block_manager.clear_prefix_cache()
            self._cached_early = None

    # --- finish ---

    def finish(self, seq: Sequence, cause: FinishCause) -> None:
        """End a waiting or running sequence and free its blocks."""
        (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
        self.block_manager.deallocate(seq)
        seq.num_scheduled_tokens = 0
        seq.status = SequenceStatus.FINISHED
        seq.finish_cause = cause

    def abort(self, seq_id: int) -> bool:
        """End the sequence. Returns False if no waiting or running sequence has this id."""
        for seq in (*self.running, *self.waiting):
            if seq.seq_id == seq_id:
                self.finish(seq, FinishCause.ABORT)
                return True
        return False
