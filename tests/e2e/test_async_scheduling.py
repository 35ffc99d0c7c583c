"""async_scheduling: a step is begun before the tokens of the one before have come; what comes out is the same."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS
from nanovllm.worker.async_output import AsyncModelOutput
from tests.e2e.conftest import BUNDLED_OPTIONS
from tests.support.counts import count_comparisons
from tests.support.engine_events import assert_occurred
from tests.support.poison import poisoned_llm
from tests.support.replay.player import play, target_for
from tests.support.replay.trace import Trace, recording

PROMPTS = list(DEMO_PROMPTS[:8])
GREEDY = SamplingParams.greedy(max_tokens=12)
# They end at different steps, by a token, by a text and by their length.
PARAMS = [
    GREEDY,
    SamplingParams(seed=3, max_tokens=20),
    SamplingParams.greedy(max_tokens=40, stop="the"),
    SamplingParams.greedy(max_tokens=1),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=4, max_tokens=30),
    SamplingParams.greedy(max_tokens=25, stop_token_ids=list(range(0, 400, 7))),
    SamplingParams(min_p=0.05, seed=5, max_tokens=9),
    SamplingParams.greedy(max_tokens=33, ignore_eos=True),
]


@pytest.fixture(scope="module")
def ahead() -> Iterator[LLM]:
    with poisoned_llm(bundled_model_path(), **BUNDLED_OPTIONS, async_scheduling=True) as llm:
        yield llm


@pytest.fixture
def llm(ahead: LLM) -> Iterator[LLM]:
    yield ahead
    assert ahead.is_finished()
    assert ahead.scheduler.block_manager.num_free_blocks == len(ahead.scheduler.block_manager.blocks)
    ahead.scheduler.block_manager.check_invariants([])


def without_ids(outputs: list[Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in output.items() if name != "seq_id"} for output in outputs]


def events_of(trace: Trace) -> Counter[str]:
    """Steps that began before the tokens of the step before were known, and tokens that they computed in addition."""
    events: Counter[str] = Counter()
    begun = 0
    for event in trace.events:
        batch = event["then"].get("batch", {})
        if event["call"] == "schedule_next_async":
            begun = len(batch)
        elif event["call"] == "commit_async_batch":
            events.update({"step ahead": 1, "token discarded": begun - len(batch)})
    return events


def test_outputs_are_the_same_however_requests_end() -> None:
    """Twice, so that the second time begins with what the first has left in flight, and with a full prefix cache."""
    outputs = {}
    for is_async in (False, True):
        with (
            LLM(str(bundled_model_path()), **BUNDLED_OPTIONS, async_scheduling=is_async) as llm,
            recording(llm) as trace,
        ):
            first = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            outputs[is_async] = without_ids(first + llm.generate(PROMPTS[::-1], PARAMS, use_tqdm=False))
    assert_occurred(events_of(trace), ["step ahead", "token discarded"])
    assert outputs[True] == outputs[False]
    assert {output["finish_reason"] for output in outputs[True]} == {"stop", "length"}
    count_comparisons("async_scheduling against waiting for each step: outputs", len(outputs[True]))


def test_the_next_step_is_begun_before_the_tokens_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens, of a prefill and four decode steps; the last is known to be the last."""
    events: list[str] = []
    with LLM(str(bundled_model_path()), **BUNDLED_OPTIONS, async_scheduling=True) as llm:
        launch, token_ids = llm._core.executor.launch, AsyncModelOutput.token_ids
        monkeypatch.setattr(llm._core.executor, "launch", lambda *args: events.append("begin") or launch(*args))
        monkeypatch.setattr(AsyncModelOutput, "token_ids", lambda self: events.append("wait") or token_ids(self))
        llm.generate([[5, 6, 7]], SamplingParams.greedy(max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert events == ["begin", *["begin", "wait"] * 4, "wait"]


def test_a_stream_is_the_output(llm: LLM) -> None:
    whole = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    texts, tokens = [""] * len(PROMPTS), [[] for _ in PROMPTS]
    for item in llm.generate_stream(PROMPTS, PARAMS):
        texts[item["index"]] += item["text"]
        tokens[item["index"]] += item["token_ids"]
    assert texts == [output["text"] for output in whole]
    assert tokens == [output["token_ids"] for output in whole]


def test_who_is_aborted_while_its_next_step_is_computed_gets_no_more_tokens(llm: LLM) -> None:
    """D19: and the others theirs."""
    alone = [output["text"] for output in llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)]
    stream = llm.generate_stream(PROMPTS[:3], GREEDY)
    items = [next(stream) for _ in range(3)]
    assert llm.abort(items[1]["seq_id"])
    items += stream
    texts = ["".join(item["text"] for item in items if item["index"] == index) for index in range(3)]
    assert [texts[0], texts[2]] == [alone[0], alone[2]]
    assert alone[1].startswith(texts[1])
    assert [item["finish_reason"] for item in items if item["index"] == 1][-1] == "abort"
    assert sum(len(item["token_ids"]) for item in items if item["index"] == 1) == 1


def test_closing_a_stream_leaves_nothing_that_the_next_call_meets(llm: LLM) -> None:
    alone = llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0]["text"]
    stream = llm.generate_stream(PROMPTS[:3], SamplingParams.greedy(max_tokens=60))
    next(stream)
    stream.close()
    assert llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0]["text"] == alone


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [1, 2, 3], ids=["prefill", "ahead of a prefill", "ahead of a decode"])
def test_a_step_that_fails_ends_the_requests_of_its_caller_and_no_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    """D18: another request decodes. What the failed step was to compute of it is computed again."""
    expected = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]["token_ids"]
    other = llm.add_request(PROMPTS[0], GREEDY)
    for _ in range(3):
        llm.step()
    launch, calls = llm._core.executor.launch, []

    def failing_launch(*args: Any) -> AsyncModelOutput:
        calls.append(args)
        if len(calls) == number:
            raise error
        return launch(*args)

    with monkeypatch.context() as planted:
        planted.setattr(llm._core.executor, "launch", failing_launch)
        with pytest.raises(type(error)):
            llm.generate(PROMPTS[1:3], GREEDY, use_tqdm=False)
    outputs = []
    while not llm.is_finished():
        outputs += llm.step().finished
    assert [output["seq_id"] for output in outputs] == [other]
    assert (outputs[0]["finish_reason"], outputs[0]["token_ids"]) == ("length", expected)
    assert llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]["token_ids"] == expected


def test_an_engine_closes_with_a_step_in_flight() -> None:
    with LLM(str(bundled_model_path()), **BUNDLED_OPTIONS, async_scheduling=True) as llm:
        llm.add_request(PROMPTS[0], GREEDY)
        llm.step()
        assert llm._core._ahead is not None
    with pytest.raises(RuntimeError, match=r"^this engine is closed: make a new one$"):
        llm.step()


def test_its_trace_replays() -> None:
    """Recorded with steps ahead, played without them."""
    options = {**BUNDLED_OPTIONS, "num_kv_cache_blocks": 6, "async_scheduling": True}
    with LLM(str(bundled_model_path()), **options) as llm, recording(llm) as trace:
        llm.generate(PROMPTS[:5], SamplingParams.greedy(max_tokens=40, ignore_eos=True), use_tqdm=False)
        assert llm.scheduler.num_preemptions > 0
    assert events_of(trace)["step ahead"] > 0
    with target_for(trace) as engine:
        score = play(trace, engine)
    assert score["steps"] > 40
    assert score["excused"] <= 1


def test_a_cpu_has_no_time_to_gain() -> None:
    with LLM(str(bundled_model_path()), **BUNDLED_OPTIONS) as llm:
        assert llm.config.async_scheduling is False


# --- on a GPU, where it is for ---


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", "float32"), ("triton", "bfloat16"), ("flash_attn", "bfloat16")]
)
def test_outputs_are_the_same_on_a_gpu(backend: str, dtype: str, enforce_eager: bool) -> None:
    """More prompts than graphs have rows; they end at different steps, some by a token that nobody knew. Greedy, since
    whoever ends leaves one batch a step later than the other, and in bfloat16 the size of a batch shows.
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
