"""EngineMachine: everything that can happen to a Scheduler, as rules that Hypothesis puts in any order.

Tokens come from a symbolic model, which computes each batch after pickling; what a step reads is compared with the
formula at once. Hypothesis' runs use async scheduling, but those of LockStep in test_scheduler_against_reference.py.
Subclasses have another hash, or an oracle of the decisions.
"""

from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm.engine.block_manager import BlockHash, block_hash
from nanovllm.engine.model_input import PADDING_SLOT, ModelInput, prepare_decode, prepare_decode_async, prepare_prefill
from nanovllm.engine.scheduler import MAX_CONSECUTIVE_PREFILLS, ScheduledBatch
from nanovllm.engine.sequence import FinishCause, Sequence
from tests.support.block_invariants import check_invariants
from tests.support.counts import count_comparisons, count_event
from tests.support.engine_events import scheduler_events
from tests.support.scheduling import make_scheduler, make_sequence
from tests.support.symbolic_model import SymbolicModel, expected_digest

MAX_MODEL_LEN = 28
EOS = 2
# Prompts of two different tokens, or of one: prefixes, blocks and whole prompts repeat.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20) | st.integers(1, 20).map(lambda length: [0] * length)
SAMPLING: list[dict[str, Any]] = [{"top_k": 1}, {"temperature": 0.5, "seed": 7}, {"top_p": 0.75, "seed": 2**64 - 1}]


def as_token(digest: int) -> int:
    """0 or 1, so that texts repeat, and the end-of-sequence token now and then."""
    return EOS if digest % 11 == 0 else digest % 2


class EngineMachine(RuleBasedStateMachine):
    hash_function: BlockHash = staticmethod(block_hash)
    supports_async_scheduling = True
    seen: ClassVar[Counter[str]] = Counter()  # what happened, over all runs

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        spare_budget=st.integers(0, 4),
        is_async=st.just(True),
    )
    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, spare_budget: int, is_async: bool = False
    ) -> None:
        self.is_async = is_async and self.supports_async_scheduling
        self.next_batch: ScheduledBatch | None = None  # computed before it is the current step
        self.block_size = block_size
        self.scheduler = make_scheduler(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=frozenset({EOS}),
            hash_function=self.hash_function,
        )
        self.manager = self.scheduler.block_manager
        self.model = SymbolicModel(num_blocks, block_size)
        self.longest = min(MAX_MODEL_LEN, num_blocks * block_size + 1)  # prompt and output that fit together
        self.live: list[Sequence] = []
        self.texts: list[list[int]] = [[0]]  # of every sequence so far
        self.num_steps = 0
        self.deadline: dict[Sequence, int] = {}  # the step in which it must have finished
        self.last_token: dict[Sequence, int] = {}  # of running sequences: the step of the last token
        self.num_decodes: Counter[Sequence] = Counter()  # since its admission
        self.has_started()

    # --- what happens ---

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=3), max_tokens=st.integers(1, 12), ignore_eos=st.booleans())
    def add(self, prompts: list[list[int]], max_tokens: int, ignore_eos: bool) -> None:
        for tokens in prompts:
            tokens = tokens[: self.longest - 1]
            self.arrive(tokens, min(max_tokens, self.longest - len(tokens)), ignore_eos)

    @rule(number=st.integers(0, 99), max_tokens=st.integers(1, 6))
    def add_again(self, number: int, max_tokens: int) -> None:
        """An earlier text, prompt and output."""
        self.add([self.texts[number % len(self.texts)]], max_tokens, ignore_eos=False)

    @rule(prompts=st.lists(PROMPTS, min_size=2, max_size=4))
    def add_a_crowd(self, prompts: list[list[int]]) -> None:
        """Memory pressure: each grows until it would fill the pool or the model's length alone."""
        self.add(prompts, self.longest, ignore_eos=True)

    @rule(num_tokens=st.integers(1, MAX_MODEL_LEN + 3), too_many=st.integers(1, 9))
    def add_what_can_never_fit(self, num_tokens: int, too_many: int) -> None:
        """D10, D11: refused at admission; the others go on."""
        max_tokens = max(self.longest - num_tokens, 0) + too_many
        is_cut = self.longest == MAX_MODEL_LEN and num_tokens < MAX_MODEL_LEN  # ends at the model's length instead
        self.arrive([1] * num_tokens, max_tokens, ignore_eos=True, is_refused=not is_cut)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 99))
    def abort(self, number: int) -> None:
        """D19."""
        seq = self.live[number % len(self.live)]
        assert self.scheduler.abort(seq.seq_id)
        self.leave(seq)

    @precondition(lambda self: self.scheduler.running)
    @rule(number=st.integers(0, 99))
    def finish(self, number: int) -> None:
        """A stop string was found in the text."""
        seq = self.scheduler.running[number % len(self.scheduler.running)]
        self.scheduler.finish(seq, FinishCause.STOP_STRING)
        self.leave(seq)

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.finish_step(self.start_step())

    @rule(number=st.integers(0, 99))
    def step_with_an_abort_inside(self, number: int) -> None:
        """D19: between schedule() and postprocess()."""
        batch = self.start_step()
        if self.live:
            self.abort(number)
        self.finish_step(batch)

    @rule()
    def step_that_fails(self) -> None:
        """D18: the engine aborts what was being computed, and goes on."""
        for seq in self.start_step().sequences:
            assert self.scheduler.abort(seq.seq_id)
            self.leave(seq)

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        while self.live:  # each has its deadline
            self.finish_step(self.start_step())
            self.limits_and_invariants_hold()
        assert self.scheduler.is_finished
        assert self.manager.num_free_blocks == len(self.manager.blocks)
        self.seen.update(scheduler_events(self.scheduler))

    def count(self, event: str, number: int = 1) -> None:
        self.seen[event] += number
        count_event(event, number)

    # --- a request, and what must hold of it ---

    def arrive(self, tokens: list[int], max_tokens: int, ignore_eos: bool, is_refused: bool = False) -> None:
        seq = make_sequence(
            tokens,
            self.block_size,
            seq_id=len(self.texts),
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            **SAMPLING[len(self.texts) % len(SAMPLING)],
        )
        if is_refused:
            with pytest.raises(ValueError, match=r"a prompt must be shorter|must fit in the KV cache"):
                self.scheduler.add(seq)
            assert seq not in self.scheduler.waiting
            self.count("request refused")
        else:
            self.scheduler.add(seq)
            self.live.append(seq)
            self.texts.append(seq.token_ids)
            self.deadline[seq] = self.num_steps + sum(map(self.most_steps, self.live))
        self.has_arrived(seq, is_refused)

    @staticmethod
    def most_steps(seq: Sequence) -> int:
        """Steps that the oldest request needs at most, whatever arrives later: at least every second step is a prefill
        and computes a token of it; or it decodes in one of MAX_CONSECUTIVE_PREFILLS + 1 steps.
        """
        max_tokens = seq.sampling_params.max_tokens
        return 2 * (seq.num_prompt_tokens + max_tokens) + (MAX_CONSECUTIVE_PREFILLS + 1) * max_tokens

    def leave(self, seq: Sequence) -> None:
        self.live.remove(seq)
        self.last_token.pop(seq, None)
        self.has_left(seq)

    # --- a step, and what must hold of it ---

    def start_step(self) -> ScheduledBatch:
        self.num_steps += 1
        before = set(self.scheduler.running)
        batch, is_computed = self.commit_or_schedule()
        self.has_scheduled(batch)
        assert bool(self.live) != batch.is_empty, "there is always something to compute"
        assert batch.num_tokens <= self.scheduler.max_num_batched_tokens
        for seq in before - set(self.scheduler.running):
            assert self.num_decodes[seq] >= self.block_size, "D17: block_size decode steps before a preemption"
            self.last_token.pop(seq, None)
        for seq in self.scheduler.running:
            self.num_decodes[seq] = 0 if seq not in before else self.num_decodes[seq] + (not batch.is_prefill)
        if not batch.is_empty:
            if not is_computed:
                prepare = prepare_prefill if batch.is_prefill else prepare_decode
                self.check_writes(prepare(batch.sequences))
                self.digests = self.model.run(batch)
            for seq, digest in zip(batch.sampled_sequences, self.digests, strict=True):
                expected = expected_digest(tuple(seq.token_ids), seq.sampling_params, seq.seed)
                assert digest == expected, f"D09: {seq} read what it should not"
            count_comparisons("symbolic model: tokens against what was attended", len(self.digests))
        return batch

    def commit_or_schedule(self) -> tuple[ScheduledBatch, bool]:
        """The step, and whether it has been computed: then self.digests are its digests."""
        if self.next_batch is not None:
            computed, self.next_batch = self.next_batch, None
            batch = self.scheduler.commit_async_batch(computed)
            if not batch.is_empty:
                digests = dict(zip(computed.sampled_sequences, self.digests, strict=True))
                self.digests = [digests[seq] for seq in batch.sampled_sequences]
                self.count("async step")
                self.count("token discarded", len(computed.sequences) - len(batch.sequences))
                return batch, True
        return self.scheduler.schedule(), False

    def compute_next(self, batch: ScheduledBatch, tokens: list[int]) -> list[int]:
        """The digests of the step after `batch`, whose `tokens` the scheduler does not know yet."""
        self.next_batch = self.scheduler.schedule_next_async(batch)
        if self.next_batch is None:
            return []
        if self.next_batch.is_prefill:
            inputs = prepare_prefill(self.next_batch.sequences)
            self.count("async prefill")
        else:
            inputs = prepare_decode_async(self.next_batch.sequences, batch.sampled_sequences)
        self.check_writes(inputs)
        if inputs.input_ids_source is not None:
            known = np.where(inputs.input_ids_source >= 0, np.array(tokens)[inputs.input_ids_source], inputs.input_ids)
            inputs = replace(inputs, input_ids=known)
        return self.model.compute(inputs)

    def check_writes(self, inputs: ModelInput) -> None:
        slots = inputs.slot_mapping
        self.count("not stored again", int((slots == PADDING_SLOT).sum()))
        for slot in slots[slots != PADDING_SLOT].tolist():
            block = self.manager.blocks[slot // self.block_size]
            assert block.ref_count == 1, "D05: a shared block is never written"
            assert not block.is_cached, "D05: a block that others may hit is never written"

    def finish_step(self, batch: ScheduledBatch) -> None:
        tokens = [as_token(digest) for digest in self.digests] if batch.sampled_sequences else []
        if self.is_async and not batch.is_empty:
            self.digests = self.compute_next(batch, tokens)
        self.scheduler.postprocess(batch, tokens)
        self.has_postprocessed(dict(zip([seq.seq_id for seq in batch.sampled_sequences], tokens, strict=True)))
        for seq in batch.sampled_sequences:
            if seq.finish_reason == "abort":
                continue
            gap = self.num_steps - self.last_token.get(seq, self.num_steps)
            assert gap <= MAX_CONSECUTIVE_PREFILLS + 1, "D15: steps between two tokens of a running sequence"
            self.count("forced decode", gap == MAX_CONSECUTIVE_PREFILLS + 1)
            self.last_token[seq] = self.num_steps
            if seq.is_finished:
                self.leave(seq)
                self.check_end(seq)

    def check_end(self, seq: Sequence) -> None:
        alone = seq.prompt_token_ids
        while len(alone) < len(seq):
            alone.append(as_token(expected_digest(tuple(alone), seq.sampling_params, seq.seed)))
        assert seq.token_ids == alone, "D08: preemption leaves no trace"
        is_eos = seq.last_token == EOS and not seq.sampling_params.ignore_eos
        assert seq.finish_reason == ("stop" if is_eos else "length")
        assert is_eos or seq.num_completion_tokens == seq.sampling_params.max_tokens or len(seq) == MAX_MODEL_LEN

    @invariant()
    def limits_and_invariants_hold(self) -> None:
        check_invariants(self.manager, self.scheduler.running)
        for block_ids in self.manager.hash_to_block_ids.values():
            prefixes = {self.manager.blocks[block_id].prefix_id for block_id in block_ids}
            self.count("hash collision", len(prefixes) > 1)
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs, "D16"
        order = [seq.seq_id for seq in (*self.scheduler.running, *self.scheduler.waiting)]
        assert order == [seq.seq_id for seq in self.live] == sorted(order), "first come, first served"
        late = [seq for seq in self.live if self.num_steps > self.deadline[seq]]
        assert not late, f"not finished within its bound of steps: {late}"

    # --- what subclasses compare ---

    def has_started(self) -> None: ...

    def has_arrived(self, seq: Sequence, is_refused: bool) -> None: ...

    def has_left(self, seq: Sequence) -> None: ...

    def has_scheduled(self, batch: ScheduledBatch) -> None: ...

    def has_postprocessed(self, tokens: dict[int, int]) -> None: ...
