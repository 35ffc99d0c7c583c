"""Scheduler: prefill in chunks first, at most some steps in a row, then decode."""

from collections import deque

from smallvllm.config import Config
from smallvllm.engine.block_manager import BlockManager
from smallvllm.engine.sequence import Sequence, SequenceStatus


class Scheduler:
    def __init__(self, config: Config):
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.max_model_len = config.max_model_len
        self.prefills_in_a_row = config.prefills_in_a_row
        self.eos = config.eos
        self.block_manager = BlockManager(config.num_kvcache_blocks, config.kvcache_block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self.num_prefills = 0

    def add(self, seq: Sequence):
        length = len(seq) + seq.max_tokens
        if length > self.max_model_len:
            raise ValueError(f"prompt and max_tokens are {length} tokens, max_model_len is {self.max_model_len}")
        room = len(self.block_manager.blocks) * self.block_manager.block_size
        if length - 1 > room:
            raise ValueError(f"prompt and max_tokens are {length} tokens, the cache holds {room}")
        self.waiting.append(seq)

    def schedule(self) -> tuple[list[Sequence], bool]:
        is_due = self.num_prefills >= self.prefills_in_a_row and any(not seq.is_prefill for seq in self.running)
        batch = [] if is_due else self._schedule_prefill()
        self.num_prefills = self.num_prefills + 1 if batch else 0
        return (batch, True) if batch else (self._schedule_decode(), False)

    def _schedule_prefill(self) -> list[Sequence]:
        batch: list[Sequence] = []
        budget = self.max_num_batched_tokens
        for seq in self.running:
            if seq.is_prefill and budget:
                budget = self._schedule_chunk(seq, budget, batch)
        while budget and self.waiting and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not self.block_manager.can_allocate(seq):
                break
            self.waiting.popleft()
            self.block_manager.allocate(seq)
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            budget = self._schedule_chunk(seq, budget, batch)
        return batch

    def _schedule_chunk(self, seq: Sequence, budget: int, batch: list[Sequence]) -> int:
        seq.num_scheduled_tokens = min(len(seq) - seq.num_cached_tokens, budget)
        batch.append(seq)
        return budget - seq.num_scheduled_tokens

    def _schedule_decode(self) -> list[Sequence]:
        batch: list[Sequence] = []
        for seq in list(self.running):
            if not self.can_decode(seq):
                continue
            while not self.block_manager.can_append(seq):
                last = self.running[-1]
                self.preempt(last)
                if last is seq:
                    break
            else:
                self.block_manager.may_append(seq)
                seq.num_scheduled_tokens = 1
                batch.append(seq)
        return batch

    def can_decode(self, seq: Sequence) -> bool:
        return not seq.is_prefill

    def preempt(self, seq: Sequence):
        self.running.remove(seq)
        seq.status = SequenceStatus.WAITING
        seq.is_prefill = True
        self.block_manager.deallocate(seq)
        self.waiting.appendleft(seq)

    def postprocess(self, seqs: list[Sequence], token_ids: list[int], is_prefill: bool):
        for seq, token_id in zip(seqs, token_ids, strict=True):
            num_computed = seq.num_scheduled_tokens if is_prefill else 1
            self.block_manager.hash_blocks(seq, num_computed)
            seq.num_cached_tokens += num_computed
            if is_prefill and seq.num_cached_tokens < len(seq):
                continue
            seq.is_prefill = False
            seq.append_token(token_id)
            is_eos = token_id == self.eos and not seq.ignore_eos
            if is_eos or seq.num_completion_tokens >= seq.max_tokens:
                self.finish(seq)

    def finish(self, seq: Sequence):
        queue = self.running if seq in self.running else self.waiting
        queue.remove(seq)
        seq.status = SequenceStatus.FINISHED
        self.block_manager.deallocate(seq)

    def abort(self, seq_id: int):
        for seq in [*self.running, *self.waiting]:
            if seq.seq_id == seq_id:
                self.finish(seq)
                return
