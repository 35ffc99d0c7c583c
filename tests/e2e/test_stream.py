"""LLM.generate_stream on the bundled model, with and without async_scheduling: which items it yields, and when."""

from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.demo_prompts import DEMO_PROMPTS
from tests.e2e.conftest import GREEDY, PARAMS, PROMPTS, contents, joined, run_to_end


def test_the_items_of_a_stream_join_to_the_outputs(engine: LLM) -> None:
    """D82: this holds for requests that end by their length, a stop token or a stop string."""
    prompts = list(DEMO_PROMPTS[: len(PARAMS)])
    outputs = engine.generate(prompts, PARAMS, use_tqdm=False)
    assert all(output["text"] for output in outputs)
    expected = contents(outputs)
    assert joined(engine.generate_stream(prompts, PARAMS)) == expected


def test_each_token_is_yielded_after_the_step_that_computes_it(llm: LLM) -> None:
    items = list(llm.generate_stream(PROMPTS, SamplingParams.greedy(max_tokens=3)))
    assert [item["index"] for item in items] == [0, 1, 2] * 3
    assert [len(item["token_ids"]) for item in items] == [1] * 9
    assert [item["finish_reason"] for item in items] == [None] * 6 + ["length"] * 3
    first = items[0]["seq_id"]
    assert [item["seq_id"] for item in items] == [first, first + 1, first + 2] * 3


def test_abort_between_steps_ends_that_request_alone(engine: LLM) -> None:
    """D19: with async_scheduling, the next token of the aborted request is already being computed, and is dropped."""
    alone = contents(engine.generate(PROMPTS, GREEDY, use_tqdm=False))
    stream = engine.generate_stream(PROMPTS, GREEDY)
    items = [next(stream) for _ in PROMPTS]
    assert engine.abort(items[1]["seq_id"])
    outputs = joined([*items, *stream])
    assert [outputs[0], outputs[2]] == [alone[0], alone[2]]
    assert (outputs[1]["token_ids"], outputs[1]["finish_reason"]) == (alone[1]["token_ids"][:1], "abort")
    assert alone[1]["text"].startswith(outputs[1]["text"])


@pytest.mark.parametrize("num_steps", [1, 2])
def test_abort_during_a_step_drops_the_token_of_that_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """D19: if that token is the first one, the request's only item is the one with finish_reason "abort"."""
    alone = contents(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    run, batches = llm._core.executor.execute, []

    def run_and_abort(batch: Any) -> list[int]:
        batches.append(batch)
        token_ids = run(batch)
        if len(batches) == num_steps:
            assert llm.abort(batch.sequences[0].seq_id)
        return token_ids

    with monkeypatch.context() as patch:
        patch.setattr(llm._core.executor, "execute", run_and_abort)
        items = list(llm.generate_stream(PROMPTS, GREEDY))
    outputs = joined(items)
    assert outputs[1:] == alone[1:]
    assert outputs[0]["token_ids"] == alone[0]["token_ids"][: num_steps - 1]
    last = {"index": 0, "text": "", "token_ids": [], "finish_reason": "abort"}
    assert {name: items[-1][name] for name in last} == last


def test_closing_a_stream_aborts_its_requests(engine: LLM) -> None:
    alone = engine.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0]["text"]
    stream = engine.generate_stream(PROMPTS, SamplingParams.greedy(max_tokens=200))
    next(stream)
    stream.close()
    assert engine.is_finished()
    assert engine.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0]["text"] == alone


def test_a_stream_that_is_never_read_queues_nothing(llm: LLM) -> None:
    llm.generate_stream(PROMPTS, GREEDY)
    assert llm.is_finished()


def test_each_call_returns_only_its_own_requests(engine: LLM) -> None:
    """D18: two streams, generate and add_request run at once, and the steps of each call compute all requests."""
    alone = contents(engine.generate(list(DEMO_PROMPTS[:4]), GREEDY, use_tqdm=False))
    streams = [engine.generate_stream(prompt, GREEDY) for prompt in DEMO_PROMPTS[:2]]
    items = [[next(stream)] for stream in streams]
    seq_id = engine.add_request(DEMO_PROMPTS[2], GREEDY)
    generated = contents(engine.generate(DEMO_PROMPTS[3], GREEDY, use_tqdm=False))
    outputs = [output for first, stream in zip(items, streams, strict=True) for output in joined([*first, *stream])]
    added = run_to_end(engine)
    assert added.keys() == {seq_id}
    assert [*outputs, *contents(added.values()), *generated] == alone
