"""The engine with 1, 2 and 4 ranks against reference/: the same tokens, and logits within float32's rounding.

Real processes over gloo, so the other ranks see nothing but pickled sequences. One engine for each architecture and
number of ranks, and one crowded scenario: chunked prompts, shared prefixes, preemption, an abort, greedy and sampled.

The bound on the logits: float32 rounding of ours and of the reference's own float32 pass are errors of the same size,
so four times the reference's largest is not reached by rounding (tests/support/oracle.py). A sum over ranks is another
order of the same additions.
"""

from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.engine.input_processor import request_seed
from nanovllm.engine.scheduler import ScheduledBatch
from reference.transformer import transformer
from tests.support.counts import count_comparisons, count_event, record_error
from tests.support.oracle import ERROR_RATIO, Oracle
from tests.support.rank_faults import MEMORY, plant_memory
from tests.support.resource_snapshot import Watch
from tests.support.serving import recorded
from tests.support.tiny_models import tiny_model

# Four query heads and two key/value heads: shared by two ranks, replicated among four.
BLOCK_SIZES = {"llama": 4, "qwen2": 1, "qwen3": 8, "qwen3_moe": 2}  # whatever the model
MAX_MODEL_LEN = 64
POOL_TOKENS = 96  # the KV cache, for requests of up to 51 tokens each
PREFIX = [7, 3, 9, 9, 2, 11, 5, 3, 8, 1, 4, 4, 10, 6, 2, 7, 12, 5, 9, 3]
GREEDY = SamplingParams.greedy(max_tokens=16, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True)
REQUESTS = [
    *[([*PREFIX, *range(20, 20 + extra)], GREEDY) for extra in (0, 1, 15)],
    *[([*PREFIX[:8], *range(40, 40 + extra)], SAMPLED) for extra in (1, 6)],
    ([1], GREEDY),
    ([*PREFIX, 20, 21], SAMPLED),
]
ABORTED = 4  # index of the request that is aborted, after NUM_TOKENS_OF_ABORTED tokens
NUM_TOKENS_OF_ABORTED = 3


def open_engine(architecture: str, size: int, is_async: bool = False) -> LLM:
    block_size = BLOCK_SIZES[architecture]
    return LLM(
        str(tiny_model(architecture)), tensor_parallel_size=size, device="cpu", attention_backend="torch",
        kv_cache_block_size=block_size, num_kv_cache_blocks=POOL_TOKENS // block_size, max_model_len=MAX_MODEL_LEN,
        max_num_seqs=6, max_num_batched_tokens=16, async_scheduling=is_async,
    )  # fmt: skip


def run_scenario(llm: LLM) -> dict[int, Any]:
    """Outputs by seq_id, which is the request's index in REQUESTS."""
    seq_ids = [llm.add_request(list(prompt), params) for prompt, params in REQUESTS]
    aborted = next(seq for seq in llm.scheduler.waiting if seq.seq_id == seq_ids[ABORTED])
    outputs: dict[int, Any] = {}
    while not llm.is_finished():
        if aborted.num_completion_tokens == NUM_TOKENS_OF_ABORTED:
            llm.abort(aborted.seq_id)
        outputs.update({output["seq_id"]: output for output in llm.step().finished})
    return outputs


@pytest.mark.parametrize("architecture", BLOCK_SIZES)
def test_ranks_give_what_the_reference_gives(architecture: str) -> None:
    """D30 D37 D39: tokens of 1, 2 and 4 ranks are the reference's, and so, up to rounding, are their logits."""
    oracle = Oracle(tiny_model(architecture), MAX_MODEL_LEN)
    tokens: dict[int, list[list[int]]] = {}
    for size in (1, 2, 4):
        with open_engine(architecture, size) as llm, recorded(llm) as logits:
            outputs = run_scenario(llm)
            events = {
                "preemption with several ranks": llm.scheduler.num_preemptions,
                "chunked prefill with several ranks": llm.scheduler.num_prefill_chunks,
                "prefix hit with several ranks": llm.scheduler.block_manager.num_hit_blocks,
            }
        for event, count in events.items():
            assert count > 0, f"vacuous: no {event}"
            if size > 1:
                count_event(event, count)
        aborted = outputs[ABORTED]
        assert (aborted["finish_reason"], len(aborted["token_ids"])) == ("abort", NUM_TOKENS_OF_ABORTED)
        check_outputs(oracle, outputs)
        check_logits(oracle, outputs, logits, size)
        tokens[size] = tokens_of(outputs)
    assert oracle.num_excused == 0  # so that tokens are compared one by one
    assert tokens[2] == tokens[1]
    assert tokens[4] == tokens[1]
    count_comparisons("ranks: tokens against reference.generate", oracle.num_compared)


def tokens_of(outputs: dict[int, Any]) -> list[list[int]]:
    return [outputs[index]["token_ids"] for index in range(len(REQUESTS))]


def test_async_scheduling_with_several_ranks_gives_the_same_tokens() -> None:
    """A step is sent before the tokens of the one before are known, and rank 0 broadcasts them. Some of the sequences
    that decode are not in the step before, which is a prefill: their tokens are known.
    """
    tokens, kinds = {}, set()
    for is_async in (False, True):
        with open_engine("qwen3", 2, is_async) as llm:
            execute = llm._core.executor.execute

            def recording_execute(batch: ScheduledBatch, *previous: Any, execute: Any = execute) -> Any:
                for pending in previous:
                    kinds.add(set(batch.sequences) <= set(pending.batch.sampled_sequences))
                return execute(batch, *previous)

            llm._core.executor.execute = recording_execute
            tokens[is_async] = tokens_of(run_scenario(llm))
    assert kinds == {True, False}
    assert tokens[True] == tokens[False]


def check_outputs(oracle: Oracle, outputs: dict[int, Any]) -> None:
    for index, (prompt, params) in enumerate(REQUESTS):
        seed = request_seed(0, index) if params.seed is None else params.seed
        oracle.check(list(prompt), params, seed, outputs[index]["token_ids"], outputs[index]["finish_reason"])


def check_logits(
    oracle: Oracle, outputs: dict[int, Any], logits: dict[tuple[int, int], torch.Tensor], size: int
) -> None:
    """Every token's logits, against one float64 pass over the whole text."""
    for index, (prompt, _) in enumerate(REQUESTS):
        token_ids = [*prompt, *outputs[index]["token_ids"]]
        ours = torch.stack([logits[index, position] for position in range(len(prompt), len(token_ids))]).double()
        exact = transformer(token_ids, *oracle.exact)[len(prompt) - 1 : -1]
        single = transformer(token_ids, *oracle.single)[len(prompt) - 1 : -1]
        error, bound = float((ours - exact).abs().max()), ERROR_RATIO * float((single - exact).abs().max())
        if size > 1:
            record_error(f"logits of {size} ranks, float32", error, bound)
            count_comparisons("ranks: logits against the reference, float64", ours.numel())
        assert error <= bound, f"request {index}"


def test_the_number_of_blocks_is_the_minimum_over_all_ranks(
    nothing_left: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D30: rank 1 has a quarter of the memory that rank 0 has."""
    sizes = []
    for rank_1 in (MEMORY, MEMORY // 4):
        plant_memory(monkeypatch, [MEMORY, rank_1])
        with LLM(str(bundled_model_path()), tensor_parallel_size=2, device="cpu", max_num_seqs=512) as llm:
            sizes.append(llm._core.executor.num_kv_cache_blocks)
            assert llm._core.executor._runner.kv_cache.shape[2] == sizes[-1]
    assert sizes[0] == 4 * sizes[1]
