"""Scheduler and BlockManager take the decisions of reference.scheduler, step by step, whatever happens to them."""

from dataclasses import replace

import pytest

from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import Sequence
from reference import postprocess, scheduler
from reference.block_manager import BlockManager
from tests.support.counts import count_comparisons
from tests.support.engine_machine import EOS, MAX_MODEL_LEN, EngineMachine
from tests.support.scheduling import two_bit_hash
from tests.unit.engine.long_runs import check_short_runs, play_until_everything_occurred


class LockStep(EngineMachine):
    """EngineMachine with the reference beside it; the two share nothing but the tokens. Without async scheduling, whose
    decisions differ where a token ends a sequence.
    """

    supports_async_scheduling = False

    def has_started(self) -> None:
        pool = BlockManager(len(self.manager.blocks), self.block_size)
        self.decision = scheduler.Decision(False, (), (), (), pool, 0)
        self.content: dict[int, tuple[int, ...]] = {}  # block -> all tokens to its end

    def has_arrived(self, seq: Sequence, is_refused: bool) -> None:
        params = seq.sampling_params
        ending = frozenset() if params.ignore_eos else frozenset({EOS})
        request = scheduler.Sequence(seq.seq_id, tuple(seq.token_ids), len(seq), params.max_tokens, ending=ending)
        assert scheduler.fits(request, self.decision.block_manager, MAX_MODEL_LEN) != is_refused, "D10, D11"
        if not is_refused:
            self.decision = replace(self.decision, waiting=(*self.decision.waiting, request))

    def has_left(self, seq: Sequence) -> None:
        self.decision = postprocess.leave(self.decision, seq.seq_id)
        self.compare_queues()

    def has_scheduled(self, batch: ScheduledBatch) -> None:
        for seq in batch.sequences:
            for index, block_id in enumerate(seq.block_table[: seq.num_cached_tokens_after_step // seq.block_size]):
                self.content[block_id] = tuple(seq.token_ids[: (index + 1) * seq.block_size])
        last = self.decision
        self.decision = scheduler.schedule(
            last.waiting,
            last.running,
            last.block_manager,
            num_consecutive_prefills=last.num_consecutive_prefills,
            max_num_seqs=self.scheduler.max_num_seqs,
            max_num_batched_tokens=self.scheduler.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
        )
        assert batch.is_prefill == self.decision.is_prefill, "D15"
        ids = [seq.seq_id for seq in batch.sequences]
        assert tuple(zip(ids, batch.num_scheduled_tokens, strict=True)) == self.decision.scheduled, "D06"
        count_comparisons("Scheduler against reference", 1 + len(ids))
        self.compare_queues()

    def has_postprocessed(self, tokens: dict[int, int]) -> None:
        self.decision, finished = postprocess.postprocess(self.decision, tokens, MAX_MODEL_LEN)
        assert {seq.seq_id: seq.finish_reason for seq in self.live if seq.is_finished} == finished, "D11, D70"
        self.compare_queues()

    def compare_queues(self) -> None:
        """Running and waiting sequences, their computed tokens, the owners of their blocks, and the order of reuse."""
        for ours, theirs in (
            (self.scheduler.running, self.decision.running),
            (self.scheduler.waiting, self.decision.waiting),
        ):
            assert [(seq.seq_id, seq.token_ids, seq.num_cached_tokens) for seq in ours] == [
                (seq.seq_id, list(seq.token_ids), seq.num_cached_tokens) for seq in theirs
            ]
            count_comparisons("Scheduler against reference", len(theirs))
        pool = self.decision.block_manager
        for seq in self.scheduler.running:
            owners = [self.manager.blocks[block_id].ref_count for block_id in seq.block_table]
            assert owners == [pool.ref_count(block) for block in pool.tables[seq.seq_id]], "D13: owners of each block"
        assert self.manager.num_free_blocks == len(pool.free), "D02"
        is_cached = [self.manager.blocks[block_id].is_cached for block_id in self.manager._free_block_ids]
        assert is_cached == sorted(is_cached), "a cached block is reused after all that hold nothing"
        reused = [self.content[block_id] for block_id in list(self.manager._free_block_ids)[is_cached.count(False) :]]
        assert reused == [pool.prefixes[block] for block in pool.reuse_order() if block in pool.prefixes]
        count_comparisons("Scheduler against reference", sum(map(len, pool.tables.values())) + 1)


class LockStepWithCollisions(LockStep):
    hash_function = staticmethod(two_bit_hash)


@pytest.mark.parametrize("machine", [LockStep, LockStepWithCollisions])
def test_the_engine_decides_as_the_reference(machine: type[LockStep]) -> None:
    """D02 D05 D06 D08 D09 D10 D11 D13 D14 D15 D16 D17 D19: what is computed, shared, kept and freed, at every step."""
    check_short_runs(machine)


def test_every_event_occurs() -> None:
    play_until_everything_occurred(LockStepWithCollisions, num_runs=8)
