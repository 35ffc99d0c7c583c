"""Scheduler, BlockManager, pickling and input preparation drive a symbolic model: every token is what it reads.

Thousands of drawn scenarios; the same through a worker in a process of its own; and faults planted to see that each way
to go wrong changes what comes out.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from nanovllm.engine.block_manager import BlockManager, block_hash
from nanovllm.engine.model_input import ModelInput, prepare_decode, prepare_prefill
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from tests.support import symbolic_model
from tests.support.counts import count_comparisons, count_event
from tests.support.engine_events import assert_occurred, scheduler_events
from tests.support.scheduling import PROMPTS, Collisions, make_scheduler, two_bit_hash
from tests.support.symbolic_model import PickledModel, SymbolicModel, SymbolicWorker, expected_digest


class Model(Protocol):
    def run(self, batch: ScheduledBatch) -> list[int]: ...


@dataclass(frozen=True)
class Request:
    """parent: the number of an earlier request whose text, prompt and output, this prompt goes on from."""

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    parent: int | None = None


@dataclass(frozen=True)
class Scenario:
    """max_model_len is as long as one sequence can get in the pool, so every request, cut to it, passes the door."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    num_spare_tokens: int  # of the budget, beyond max_num_seqs
    hash_function: Callable[[list[int], int | None], int]
    requests: tuple[Request, ...]

    @property
    def max_model_len(self) -> int:
        return self.num_blocks * self.block_size + 1


def scenarios() -> st.SearchStrategy[Scenario]:
    params = st.sampled_from([SamplingParams.greedy(), SamplingParams(temperature=0.5), SamplingParams(top_p=0.75)])
    request = st.builds(
        Request,
        step=st.integers(0, 12),
        prompt=PROMPTS.map(tuple),
        params=st.builds(lambda p, n: replace(p, max_tokens=n), params, st.integers(1, 12)),
        seed=st.sampled_from([0, 7, 2**64 - 1]),
        parent=st.none() | st.integers(0, 5),
    )
    return st.builds(
        Scenario,
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        num_spare_tokens=st.integers(0, 8),
        hash_function=st.sampled_from([block_hash, two_bit_hash]),
        requests=st.lists(request, min_size=1, max_size=6).map(lambda rs: tuple(sorted(rs, key=lambda r: r.step))),
    )


def play(scenario: Scenario, start_model: Callable[[int, int], Model]) -> Counter[str]:
    """Serve the scenario's requests; every output must be the one from the formula. Returns what occurred."""
    scheduler = make_scheduler(
        scenario.num_blocks,
        scenario.block_size,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_seqs + scenario.num_spare_tokens,
        max_model_len=scenario.max_model_len,
        hash_function=scenario.hash_function,
    )
    model = start_model(scenario.num_blocks, scenario.block_size)
    collisions = Collisions(scheduler.block_manager)
    sequences: list[Sequence] = []
    pending = list(scenario.requests)
    for step in range(1000):
        while pending and pending[0].step <= step:
            sequences.append(arriving(pending.pop(0), scenario, sequences))
            scheduler.add(sequences[-1])
        if not pending and scheduler.is_finished:
            break
        batch = scheduler.schedule()
        scheduler.postprocess(batch, [] if batch.is_empty else model.run(batch))
        collisions.count()
    assert scheduler.is_finished
    for seq in sequences:
        text = expected_text(seq, scenario.max_model_len)
        assert seq.token_ids == text, f"{seq} did not read what it should: tokens {seq.token_ids}, expected {text}"
    num_tokens = sum(seq.num_completion_tokens for seq in sequences)
    count_comparisons("symbolic model: tokens against what was attended", num_tokens)
    count_event("hash collision", collisions.number)
    return scheduler_events(scheduler) + Counter({"hash collision": collisions.number})


def arriving(request: Request, scenario: Scenario, earlier: list[Sequence]) -> Sequence:
    begin = earlier[request.parent % len(earlier)].token_ids if request.parent is not None and earlier else []
    prompt = [*begin, *request.prompt][: scenario.max_model_len - 1]
    return Sequence(prompt, request.params, seq_id=len(earlier), block_size=scenario.block_size, seed=request.seed)


def expected_text(seq: Sequence, max_model_len: int) -> list[int]:
    text = seq.prompt_token_ids
    while len(text) < min(seq.num_prompt_tokens + seq.sampling_params.max_tokens, max_model_len):
        text.append(expected_digest(tuple(text), seq.sampling_params, seq.seed))
    return text


EVENTS = ("preemption", "prefill chunk", "block hit", "block evicted", "hash collision")  # all occur in CROWDED
CROWDED = Scenario(7, 2, 3, 1, two_bit_hash, tuple(
    Request(index // 2, (0, 1, 1, 0, index % 2, 1), SamplingParams.greedy(max_tokens=8), 7, parent)
    for index, parent in enumerate((None, None, 0, 0, None, 1))
))  # fmt: skip


def campaign(max_examples: int, start_model: Callable[[int, int], Model]) -> None:
    """Drawn scenarios, and one in which every event occurs."""
    events: Counter[str] = Counter()

    @settings(max_examples=max_examples)
    @given(scenario=scenarios())
    @example(scenario=CROWDED)
    def play_scenario(scenario: Scenario) -> None:
        events.update(play(scenario, start_model))

    play_scenario()
    assert_occurred(events, EVENTS)


def test_every_token_reads_what_it_should() -> None:
    """D01 D04 D05 D06 D07 D08 D09 D13 D57: through pickled batches, with chunks, hits, evictions and preemptions."""
    campaign(20 * settings().max_examples, PickledModel)


def test_a_worker_in_another_process_reads_the_same() -> None:
    """D04, D31: it knows what was pickled for it, and nothing of torch."""
    with SymbolicWorker() as worker:
        campaign(settings().max_examples, worker.start)
        assert {"torch", "transformers", "triton"}.isdisjoint(worker.loaded_modules())


def test_unpickled_and_pickled_batches_give_the_same() -> None:
    """The first rank does not pickle: the same scenario, played either way, has the same oracle."""
    request = Request(0, (0, 1, 1, 0, 1), SamplingParams.greedy(max_tokens=9), seed=7)
    scenario = Scenario(5, 2, 2, 2, block_hash, (request, replace(request, step=3, parent=0), request))
    play(scenario, SymbolicModel)
    play(scenario, PickledModel)


# --- what each fault looks like: all of them must be noticed ---


def change_input(**changes: Callable[[ModelInput], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in ModelInput: the named fields become what the functions make of it."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        for prepare in (prepare_prefill, prepare_decode):

            def faulty(sequences: Any, prepare: Any = prepare) -> ModelInput:
                inputs = prepare(sequences)
                return replace(inputs, **{name: change(inputs) for name, change in changes.items()})

            monkeypatch.setattr(symbolic_model, prepare.__name__, faulty)

    return plant


def change_method(owner: type, name: str, wrap: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


def longer(lens: np.ndarray, by: int) -> np.ndarray:
    return np.maximum(lens + by, 1)


def key_bounds(inputs: ModelInput, by: int) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(longer(inputs.context_lens, by)))).astype(np.int32)


def last_column_stale(inputs: ModelInput) -> np.ndarray | None:
    tables = inputs.block_tables
    return tables if tables is None else np.concatenate((tables[:, :-1], tables[:, :1]), axis=1)


def one_column_more(inputs: ModelInput) -> np.ndarray | None:
    tables = inputs.block_tables
    return tables if tables is None else np.concatenate((tables, tables[:, -1:]), axis=1)


def cached_too_early(cache_full_blocks: Any) -> Any:
    """Blocks become hittable when the prompt is admitted, not when it is computed."""

    def allocate_and_cache(self: BlockManager, seq: Sequence) -> None:
        cache_full_blocks(self, seq)
        num_stored, seq.num_tokens_with_kv = seq.num_tokens_with_kv, len(seq)
        cache_full_blocks(self, seq)
        seq.num_tokens_with_kv = num_stored

    return allocate_and_cache


def find_without_parent(find: Any) -> Any:
    def find_by_tokens(self: BlockManager, hash_value: int, token_ids: list[int], parent: int | None) -> Any:
        blocks = (block for block in self._candidates(hash_value) if block.token_ids == token_ids)
        return next(blocks, None)

    return find_by_tokens


def one_too_many_cached(allocate: Any) -> Any:
    def allocate_and_skip_one(self: BlockManager, seq: Sequence) -> None:
        allocate(self, seq)
        seq.num_cached_tokens = min(seq.num_cached_tokens + 1, len(seq) - 1)

    return allocate_and_skip_one


def free_while_shared(deallocate: Any) -> Any:
    def deallocate_all(self: BlockManager, seq: Sequence) -> None:
        shared = [block for block in seq.block_table if self.blocks[block].ref_count > 1]
        deallocate(self, seq)
        for block_id in shared:
            self._free_block_ids[block_id] = None
            self._free_block_ids.move_to_end(block_id, last=False)

    return deallocate_all


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "slots one too far (D01)": change_input(slot_mapping=lambda x: np.where(x.slot_mapping > 0, x.slot_mapping - 1, 0)),
    "positions one too far (D01)": change_input(positions=lambda x: x.positions + 1),
    "tokens of the neighbour": change_input(input_ids=lambda x: np.roll(x.input_ids, 1)),
    "one key too few": change_input(
        context_lens=lambda x: longer(x.context_lens, -1), cu_seqlens_k=lambda x: key_bounds(x, -1)
    ),
    "keys of the whole block (D07)": change_input(
        context_lens=lambda x: longer(x.context_lens, 1),
        cu_seqlens_k=lambda x: key_bounds(x, 1),
        max_seqlen_k=lambda x: x.max_seqlen_k + 1,
        block_tables=one_column_more,
    ),
    "the longest key length too short": change_input(max_seqlen_k=lambda x: x.max_seqlen_k - 1),
    "the longest query length too short": change_input(max_seqlen_q=lambda x: x.max_seqlen_q - 1),
    "a sequence left out": change_input(sequence_order=lambda x: x.sequence_order[:-1]),
    "block tables in another order": change_input(
        block_tables=lambda x: None if x.block_tables is None else np.roll(x.block_tables, 1, axis=0)
    ),
    "a stale last block": change_input(block_tables=last_column_stale),
    "the token before the last sampled": change_input(sample_indices=lambda x: np.maximum(x.sample_indices - 1, 0)),
    "seeds of the neighbour (D57)": change_input(
        sampling=lambda x: replace(x.sampling, seed_low=np.roll(x.sampling.seed_low, 1))
    ),
    "temperatures of the neighbour (D57)": change_input(
        sampling=lambda x: replace(x.sampling, temperature=np.roll(x.sampling.temperature, 1))
    ),
    "noise of the position before": change_input(
        sampling=lambda x: replace(x.sampling, position=x.sampling.position - 1)
    ),
    "pickled without the right tokens (D04)": change_method(
        Sequence, "scheduled_token_ids", lambda _: property(lambda self: self.token_ids[-self.num_scheduled_tokens :])
    ),
    "hittable before it is computed": change_method(BlockManager, "cache_full_blocks", cached_too_early),
    "hit without its parent (D09)": change_method(BlockManager, "_find", find_without_parent),
    "a shared block freed with its first owner": change_method(BlockManager, "deallocate", free_while_shared),
    "one token too many taken as cached": change_method(BlockManager, "allocate", one_too_many_cached),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_what_comes_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument's own test: the first of the derandomised scenarios that the fault spoils ends the search."""

    @settings(max_examples=500, derandomize=True, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(scenario=scenarios())
    def search(scenario: Scenario) -> None:
        play(scenario, PickledModel)

    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError, match="did not read what it should"):
        search()
