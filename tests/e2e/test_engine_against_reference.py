"""The engine against reference.generate: whatever the pool, the budget, the order of arrival and the preemptions,
tokens and logits stay the same. Under poison: what may not be read is NaN.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from nanovllm import SamplingParams
from nanovllm.engine.input_processor import request_seed
from tests.support.block_invariants import check_invariants
from tests.support.counts import count_event
from tests.support.engine_events import assert_occurred, scheduler_events
from tests.support.oracle import Oracle
from tests.support.poison import poisoned_llm
from tests.support.serving import recorded
from tests.support.tiny_models import tiny_model

MAX_MODEL_LEN = 40
EVENTS = ("preemption", "prefill chunk", "block hit", "block evicted", "abort")
SHARED_PREFIX = [7, 3, 9, 9, 2, 11, 5, 3, 8, 1, 4, 4, 10, 6, 2, 7, 12, 5, 9, 3]


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    abort_after: int | None  # steps after its arrival


@dataclass(frozen=True)
class Scenario:
    block_size: int
    num_spare_blocks: int  # beyond what the largest request needs
    max_num_seqs: int
    num_spare_tokens: int  # of the budget, beyond max_num_seqs
    arrivals: tuple[Arrival, ...]
    preempt_every: int | None = None  # steps, after which the last running sequence loses its blocks
    is_async: bool = False


# Few of each, so that prefixes, blocks and whole requests repeat, and the oracle computes each request once.
PARAMS = [
    SamplingParams.greedy(max_tokens=1),
    SamplingParams.greedy(max_tokens=6),
    SamplingParams.greedy(max_tokens=14, ignore_eos=True),
    SamplingParams.greedy(max_tokens=30),
    SamplingParams(temperature=1.3, seed=5, max_tokens=14),
    SamplingParams(temperature=0.7, top_k=8, min_p=0.05, seed=6, max_tokens=14),
    SamplingParams(top_p=0.8, seed=7, max_tokens=14),
    SamplingParams(max_tokens=6),  # its seed comes from the order of arrival
]
PROMPTS = [(*SHARED_PREFIX[:length], *end) for length in (2, 4, 9, 16, 20) for end in ((), (1,), (2, 1))]


def scenarios() -> st.SearchStrategy[Scenario]:
    """Pools in which the requests barely fit, so that nearly every scenario evicts and many preempt."""
    arrival = st.builds(
        Arrival,
        step=st.integers(0, 6),
        prompt=st.sampled_from(PROMPTS),
        params=st.sampled_from(PARAMS),
        abort_after=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 15)),
    )
    return st.builds(
        Scenario,
        block_size=st.sampled_from([1, 2, 4, 16]),
        num_spare_blocks=st.integers(0, 4),
        max_num_seqs=st.integers(1, 6),
        num_spare_tokens=st.integers(0, 12),
        arrivals=st.lists(arrival, min_size=4, max_size=10).map(
            lambda items: tuple(sorted(items, key=lambda arrival: arrival.step))
        ),
        preempt_every=st.one_of(st.none(), st.integers(2, 5)),
        is_async=st.booleans(),
    )


# Four blocks to spare for ten requests that arrive together: all of EVENTS occur in it.
CROWDED = Scenario(
    block_size=2,
    num_spare_blocks=4,
    max_num_seqs=6,
    num_spare_tokens=4,
    arrivals=tuple(
        Arrival(index // 4, PROMPTS[3 * index % len(PROMPTS)], PARAMS[2 + index % 5], 9 if index == 7 else None)
        for index in range(10)
    ),
)


def run(model_dir: str, scenario: Scenario, oracle: Oracle, **options: Any) -> Counter[str]:
    """Play the scenario, check every output, and count the events. options: more of the engine's."""
    largest = max(
        min(len(arrival.prompt) + arrival.params.max_tokens, MAX_MODEL_LEN) - 1 for arrival in scenario.arrivals
    )
    poisoned = poisoned_llm(
        model_dir,
        device="cpu",
        dtype="float32",
        attention_backend="torch",
        max_model_len=MAX_MODEL_LEN,
        kv_cache_block_size=scenario.block_size,
        num_kv_cache_blocks=-(-largest // scenario.block_size) + scenario.num_spare_blocks,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_seqs + scenario.num_spare_tokens,
        async_scheduling=scenario.is_async,
        **options,
    )
    with poisoned as llm, recorded(llm) as logits:
        arrivals, outputs, step = {}, {}, 0
        pending = list(scenario.arrivals)
        while pending or not llm.is_finished():
            while pending and pending[0].step <= step:
                arrival = pending.pop(0)
                arrivals[llm.add_request(list(arrival.prompt), arrival.params)] = arrival
            for seq_id, arrival in arrivals.items():
                if arrival.abort_after is not None and step == arrival.step + arrival.abort_after:
                    llm.abort(seq_id)
            outputs.update({output["seq_id"]: output for output in llm.step().finished})
            step += 1
            if scenario.preempt_every and step % scenario.preempt_every == 0 and llm.scheduler.running and step < 500:
                llm.scheduler.preempt(llm.scheduler.running[-1])
            check_invariants(llm.scheduler.block_manager, (*llm.scheduler.running, *llm.scheduler.waiting))
            assert step < 2000, "the engine does not finish"
        manager = llm.scheduler.block_manager
        assert manager.num_free_blocks == len(manager.blocks), "blocks are left behind"
        counts = scheduler_events(llm.scheduler)
    assert outputs.keys() == arrivals.keys()
    for seq_id, output in outputs.items():
        arrival = arrivals[seq_id]
        seed = request_seed(0, seq_id) if arrival.params.seed is None else arrival.params.seed
        if output["finish_reason"] == "abort":
            assert arrival.abort_after is not None
            counts["abort"] += 1
            count_event("abort")
        prompt, token_ids = list(arrival.prompt), output["token_ids"]
        sampled_from = [logits[seq_id, len(prompt) + index] for index in range(len(token_ids))]
        oracle.check(prompt, arrival.params, seed, token_ids, output["finish_reason"], sampled_from)
    return counts


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_outputs_never_change(architecture: str) -> None:
    """D05 D06 D07 D08 D09 D13 D14 D53 D57 D58: nothing of a scenario changes an output."""
    model_dir = tiny_model(architecture)
    oracle = Oracle(model_dir, MAX_MODEL_LEN)
    counts: Counter[str] = Counter()

    @settings(max_examples=max(10, settings().max_examples // 8))  # the three below have every event
    @given(scenario=scenarios())
    @example(scenario=CROWDED)
    @example(scenario=replace(CROWDED, preempt_every=3))
    @example(scenario=replace(CROWDED, is_async=True))
    def campaign(scenario: Scenario) -> None:
        counts.update(run(str(model_dir), scenario, oracle))

    campaign()
    print(f"{architecture}: {dict(counts)}, {oracle.num_compared} tokens compared, {oracle.num_excused} excused")
    assert_occurred(counts, EVENTS)
    assert oracle.num_excused <= oracle.num_compared // 200, "too many near ties to prove anything"
