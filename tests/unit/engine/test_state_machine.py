"""Scheduler, BlockManager and ModelInput in lock-step with a symbolic KV cache, over drawn requests, steps and aborts.

A slot of the symbolic cache holds what a key depends on: the tokens from the first of its sequence to its own. So what
a step reads through ModelInput can be compared with what it has to be: a wrong, stale or foreign block is seen at once.
"""

import random
from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm.engine.block_manager import block_hash
from nanovllm.engine.scheduler import MAX_CONSECUTIVE_PREFILLS, ScheduledBatch
from nanovllm.engine.sequence import Sequence
from tests.unit.engine.harness import as_worker_sees, make_scheduler, make_sequence

MAX_MODEL_LEN = 28
EOS = 2


def next_token(seq: Sequence) -> int:
    """0 or 1, so that texts repeat, and the end-of-sequence token now and then; depends on the tokens only."""
    number = sum((position + 1) * token for position, token in enumerate(seq.token_ids)) + len(seq)
    return EOS if number % 11 == 0 else number % 2


def weak_hash(tokens: list[int], parent: int | None) -> int:
    return sum(tokens) % 3


class EngineMachine(RuleBasedStateMachine):
    seen: ClassVar[Counter[str]] = Counter()  # what happened, over all runs

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        spare_budget=st.integers(0, 4),
        hash_function=st.sampled_from([block_hash, weak_hash]),
    )
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, spare_budget: int, hash_function: Any) -> None:
        self.block_size = block_size
        self.scheduler = make_scheduler(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=frozenset({EOS}),
            hash_function=hash_function,
        )
        self.manager = self.scheduler.block_manager
        self.slots: dict[int, tuple[int, ...]] = {}
        self.live: list[Sequence] = []
        self.num_arrivals = 0
        self.num_waits: Counter[Sequence] = Counter()  # prefill steps in a row in which it could have decoded
        self.num_decodes: Counter[Sequence] = Counter()  # decode steps since its admission

    # --- what happens ---

    @rule(
        prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=3),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
    )
    def add(self, prompts: list[list[int]], max_tokens: int, ignore_eos: bool) -> None:
        for tokens in prompts:
            seq = make_sequence(
                tokens, self.block_size, seq_id=self.num_arrivals, max_tokens=max_tokens, ignore_eos=ignore_eos
            )
            num_stored = min(len(tokens) + max_tokens, MAX_MODEL_LEN) - 1
            if -(-num_stored // self.block_size) > len(self.manager.blocks):
                continue  # the door refuses it
            self.scheduler.add(seq)
            self.live.append(seq)
            self.num_arrivals += 1

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 9))
    def abort(self, number: int) -> None:
        """D19."""
        seq = self.live[number % len(self.live)]
        assert self.scheduler.abort(seq.seq_id)
        self.live.remove(seq)

    @rule(num_steps=st.integers(1, 6))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.finish_step(self.start_step())

    @rule(number=st.integers(0, 9))
    def step_with_an_abort_inside(self, number: int) -> None:
        """D19: between schedule() and postprocess()."""
        batch = self.start_step()
        if self.live:
            self.abort(number)
        self.finish_step(batch)

    def teardown(self) -> None:
        """Everyone is served: the oldest request gets on, if only in every MAX_CONSECUTIVE_PREFILLS + 1st step."""
        if not hasattr(self, "live"):
            return
        bound = sum(2 * len(seq) + (MAX_CONSECUTIVE_PREFILLS + 1) * seq.sampling_params.max_tokens for seq in self.live)
        for _ in range(bound):
            self.finish_step(self.start_step())
            self.limits_and_invariants_hold()
        assert self.scheduler.is_finished
        assert not self.live
        assert self.manager.num_free_blocks == len(self.manager.blocks)
        self.seen["preemption"] += self.scheduler.num_preemptions
        self.seen["chunk"] += self.scheduler.num_prefill_chunks
        self.seen["hit"] += self.manager.num_hit_blocks
        self.seen["eviction"] += self.manager.num_evictions

    # --- a step, and what must hold of it ---

    def start_step(self) -> ScheduledBatch:
        before = set(self.scheduler.running)
        batch = self.scheduler.schedule()
        assert bool(self.live) != batch.is_empty, "there is always something to compute"
        assert batch.num_tokens <= self.scheduler.max_num_batched_tokens
        for seq in before - set(self.scheduler.running):
            assert self.num_decodes[seq] >= self.block_size, "D17: block_size decode steps before a preemption"
        for seq in self.scheduler.running:
            if seq not in before:
                self.num_decodes[seq] = 0
            elif batch.is_prefill and seq.is_decodable:
                self.num_waits[seq] += 1
                self.seen["turn"] += self.num_waits[seq] == MAX_CONSECUTIVE_PREFILLS
                assert self.num_waits[seq] <= MAX_CONSECUTIVE_PREFILLS, "D15: decoding gets its turn"
            if not batch.is_prefill:
                self.num_decodes[seq] += 1
        for seq in batch.sequences:
            self.num_waits[seq] = 0
        if not batch.is_empty:
            self.compute(batch)
        return batch

    def compute(self, batch: ScheduledBatch) -> None:
        """Write and read the symbolic cache as a model does through ModelInput."""
        inputs = as_worker_sees(batch)
        ends = inputs.cu_seqlens_q.tolist()
        for row, seq in enumerate(batch.sequences):
            for index in range(ends[row], ends[row + 1]):
                position, slot = int(inputs.positions[index]), int(inputs.slot_mapping[index])
                assert inputs.input_ids[index] == seq.token_ids[position]
                if slot == -1:
                    self.seen["not stored again"] += 1
                    continue
                block = self.manager.blocks[slot // self.block_size]
                assert block.ref_count == 1, "D05: a shared block is never written"
                assert not block.is_cached, "D05: a block that others may hit is never written"
                self.slots[slot] = tuple(seq.token_ids[: position + 1])
        for row, seq in enumerate(batch.sequences):
            num_keys = int(inputs.context_lens[row])
            assert num_keys == seq.num_cached_tokens + seq.num_scheduled_tokens
            if inputs.block_tables is None:
                assert num_keys == ends[row + 1] - ends[row], "without block tables the keys are this step's"
                continue
            table = inputs.block_tables[row].tolist()
            for position in range(num_keys):
                slot = table[position // self.block_size] * self.block_size + position % self.block_size
                assert self.slots.get(slot) == tuple(seq.token_ids[: position + 1]), "D09: a wrong key is read"

    def finish_step(self, batch: ScheduledBatch) -> None:
        self.scheduler.postprocess(batch, [next_token(seq) for seq in batch.sampled_sequences])
        for seq in [seq for seq in self.live if seq.is_finished]:
            self.live.remove(seq)
            alone = make_sequence(seq.prompt_token_ids)
            while len(alone) < len(seq):
                alone.append_token(next_token(alone))
            assert seq.token_ids == alone.token_ids, "D08: preemption leaves no trace"
            is_eos = seq.last_token == EOS and not seq.sampling_params.ignore_eos
            assert seq.finish_reason == ("stop" if is_eos else "length")
            assert is_eos or seq.num_completion_tokens == seq.sampling_params.max_tokens or len(seq) == MAX_MODEL_LEN

    @invariant()
    def limits_and_invariants_hold(self) -> None:
        if not hasattr(self, "live"):
            return
        self.manager.check_invariants(self.scheduler.running)
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs, "D16"
        order = [seq.seq_id for seq in (*self.scheduler.running, *self.scheduler.waiting)]
        assert order == [seq.seq_id for seq in self.live] == sorted(order), "first come, first served"
        for block in self.manager.blocks:
            if block.is_cached:
                first = block.block_id * self.block_size
                stored = [self.slots[slot][-1] for slot in range(first, first + self.block_size)]
                assert stored == block.token_ids, "what may be hit holds what it says"


@pytest.mark.timeout(1800)  # with the nightly profile's examples
def test_no_run_reads_a_wrong_key_breaks_a_limit_or_starves_anyone() -> None:
    """D02, D05, D08, D09, D13, D15, D16, D17, D19; and liveness: each request ends within its bound of steps."""
    run_state_machine_as_test(EngineMachine, settings=settings(stateful_step_count=30))


def test_long_runs_in_which_everything_happens() -> None:
    """D05, D08, D09, D15, D17: as above, with preemptions, chunks, hits, evictions and forced decodes for certain."""
    EngineMachine.seen.clear()
    rng = random.Random(0)
    for _ in range(25):
        machine = EngineMachine()
        machine.start(rng.randint(6, 16), rng.randint(1, 4), rng.randint(2, 4), rng.randint(0, 2), weak_hash)
        for number in range(40):
            prompts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 18))] for _ in range(rng.randint(0, 2))]
            machine.add(prompts, rng.randint(1, 12), ignore_eos=rng.random() < 0.7)
            machine.steps(rng.randint(1, 6))
            if rng.random() < 0.1:
                machine.step_with_an_abort_inside(number)
            machine.limits_and_invariants_hold()
        machine.teardown()
    events = ("preemption", "chunk", "hit", "eviction", "turn", "not stored again")
    assert all(EngineMachine.seen[event] for event in events), EngineMachine.seen
