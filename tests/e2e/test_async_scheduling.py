"""async_scheduling: a step begins before the tokens of the step before it are known, and the outputs stay the same."""

from collections import Counter
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS
from nanovllm.worker.async_output import AsyncModelOutput
from tests.e2e.conftest import PARAMS, bundled_llm
from tests.support.counts import count_comparisons
from tests.support.engine_events import assert_occurred
from tests.support.replay import Trace, play, record


def without_ids(outputs: list[Any]) -> list[dict[str, Any]]:
    return [{**output, "seq_id": None} for output in outputs]


def events_of(trace: Trace) -> Counter[str]:
    """Steps that began before the tokens of the step before were known, and tokens that were computed and dropped."""
    events: Counter[str] = Counter()
    begun = 0
    for event in trace["events"]:
        batch = event["then"].get("batch", {})
        if event["call"] == "schedule_next_async":
            begun = len(batch)
        elif event["call"] == "commit_async_batch":
            events.update({"step ahead": 1, "token discarded": begun - len(batch)})
    return events


def test_outputs_are_the_same_however_requests_end() -> None:
    """The second call begins with the step that the first has left in flight, and with a full prefix cache."""
    prompts, outputs = list(DEMO_PROMPTS[: len(PARAMS)]), {}
    for is_async in (False, True):
        with bundled_llm(async_scheduling=is_async) as llm:
            trace = record(llm)
            first = llm.generate(prompts, PARAMS, use_tqdm=False)
            outputs[is_async] = without_ids(first + llm.generate(prompts[::-1], PARAMS, use_tqdm=False))
    assert_occurred(events_of(trace), ["step ahead", "token discarded"])
    assert outputs[True] == outputs[False]
    assert {output["finish_reason"] for output in outputs[True]} == {"stop", "length"}
    count_comparisons("async_scheduling against waiting for each step: outputs", len(outputs[True]))


def test_the_next_step_begins_before_the_tokens_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens, of a prefill and four decode steps; the last is known to be the last."""
    events: list[str] = []
    with bundled_llm(async_scheduling=True) as llm:
        execute, token_ids = llm._core.executor.execute, AsyncModelOutput.token_ids
        monkeypatch.setattr(llm._core.executor, "execute", lambda *args: events.append("begin") or execute(*args))
        monkeypatch.setattr(AsyncModelOutput, "token_ids", lambda self: events.append("wait") or token_ids(self))
        llm.generate([[5, 6, 7]], SamplingParams.greedy(max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert events == ["begin", *["begin", "wait"] * 4, "wait"]


def test_a_trace_of_async_steps_replays_without_them() -> None:
    with bundled_llm(num_kv_cache_blocks=6, async_scheduling=True) as llm:
        trace = record(llm)
        llm.generate(list(DEMO_PROMPTS[:5]), SamplingParams.greedy(max_tokens=40, ignore_eos=True), use_tqdm=False)
        assert llm.scheduler.num_preemptions > 0
    assert events_of(trace)["step ahead"] > 0
    assert play(trace)["steps"] > 40


def test_the_default_is_off_on_a_cpu() -> None:
    with bundled_llm() as llm:
        assert llm.config.async_scheduling is False


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", "float32"), ("triton", "bfloat16"), ("flash_attn", "bfloat16")]
)
def test_outputs_are_the_same_on_a_gpu(backend: str, dtype: str, enforce_eager: bool) -> None:
    """More prompts than graphs have rows. Greedy: a request that ends leaves one of the two batches a step later than
    the other, and in bfloat16 logits depend on the size of the batch.
    """
    prompts = list(DEMO_PROMPTS)
    greedy = [params for params in PARAMS if params.top_k == 1]
    params = [greedy[index % len(greedy)] for index in range(len(prompts))]

    def outputs(is_async: bool | None) -> list[dict[str, Any]]:
        with LLM(
            str(bundled_model_path()), device="cuda", dtype=dtype, attention_backend=backend, max_model_len=512,
            max_num_seqs=20, enforce_eager=enforce_eager, num_kv_cache_blocks=48, async_scheduling=is_async,
        ) as llm:  # fmt: skip
            assert llm.config.async_scheduling is (is_async is None)
            return without_ids(llm.generate(prompts, params, use_tqdm=False))

    assert outputs(is_async=None) == outputs(is_async=False)
