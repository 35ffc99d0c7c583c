"""LLM.generate_stream on the bundled model: what comes when, for whom, and how it ends."""

from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path
from tests.e2e.conftest import BUNDLED_OPTIONS

GREEDY = SamplingParams.greedy(max_tokens=12)
PROMPTS = ["In the beginning", "The LORD is my shepherd", "And God said"]


def test_the_stream_joined_is_the_output(llm: LLM) -> None:
    params = [SamplingParams.greedy(max_tokens=30), SamplingParams(seed=3, max_tokens=17), GREEDY]
    whole = llm.generate(PROMPTS, params, use_tqdm=False)
    texts, tokens, reasons = [""] * 3, [[], [], []], [None] * 3
    for item in llm.generate_stream(PROMPTS, params):
        assert reasons[item["index"]] is None, "an item after the last one"
        texts[item["index"]] += item["text"]
        tokens[item["index"]] += item["token_ids"]
        reasons[item["index"]] = item["finish_reason"]
    assert texts == [output["text"] for output in whole]
    assert tokens == [output["token_ids"] for output in whole]
    assert reasons == [output["finish_reason"] for output in whole]


def test_a_stream_hands_out_each_token_in_the_step_in_which_it_came(llm: LLM) -> None:
    items = list(llm.generate_stream(PROMPTS, SamplingParams.greedy(max_tokens=3)))
    assert [item["index"] for item in items] == [0, 1, 2] * 3
    assert [len(item["token_ids"]) for item in items] == [1] * 9
    assert [item["finish_reason"] for item in items] == [None] * 6 + ["length"] * 3
    first = items[0]["seq_id"]
    assert [item["seq_id"] for item in items] == [first, first + 1, first + 2] * 3


def test_who_is_aborted_in_the_midst_of_a_stream_gets_an_item_that_says_so(llm: LLM) -> None:
    stream = llm.generate_stream(PROMPTS[:2], SamplingParams.greedy(max_tokens=3))
    seq_id = next(stream)["seq_id"]
    assert llm.abort(seq_id)
    items = list(stream)
    assert [(item["index"], item["finish_reason"]) for item in items] == [(1, None)] * 2 + [(1, "length"), (0, "abort")]
    assert (items[-1]["text"], items[-1]["token_ids"]) == ("", [])


def test_who_is_aborted_while_a_step_is_computed_gets_no_token_of_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """D19: the others get theirs, and their text."""
    expected = [output["text"] for output in llm.generate(PROMPTS, SamplingParams.greedy(max_tokens=3), use_tqdm=False)]
    execute = llm._core.executor.execute
    stream = llm.generate_stream(PROMPTS, SamplingParams.greedy(max_tokens=3))
    items = [next(stream) for _ in PROMPTS]
    first = items[0]["seq_id"]

    def execute_and_abort(batch: Any) -> Any:
        pending = execute(batch)
        llm.abort(first)
        return pending

    monkeypatch.setattr(llm._core.executor, "execute", execute_and_abort)
    items += stream
    monkeypatch.setattr(llm._core.executor, "execute", execute)
    assert [(item["index"], item["finish_reason"]) for item in items[3:]] == [
        *[(1, None), (2, None), (1, "length"), (2, "length")],
        (0, "abort"),
    ]
    assert ["".join(item["text"] for item in items if item["index"] == index) for index in (1, 2)] == expected[1:]
    assert (items[-1]["text"], items[-1]["token_ids"]) == ("", [])


def test_who_is_aborted_before_its_first_token_gets_an_item_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """D19."""
    execute = llm._core.executor.execute

    def execute_and_abort(batch: Any) -> Any:
        pending = execute(batch)
        assert llm.abort(batch.sequences[0].seq_id)
        return pending

    monkeypatch.setattr(llm._core.executor, "execute", execute_and_abort)
    (item,) = llm.generate_stream(PROMPTS[0], GREEDY)
    assert (item["text"], item["token_ids"], item["finish_reason"]) == ("", [], "abort")


def test_a_stream_outlives_its_engine_and_ends() -> None:
    llm = LLM(str(bundled_model_path()), **BUNDLED_OPTIONS)
    stream = llm.generate_stream(PROMPTS, GREEDY)
    assert next(stream)["seq_id"] == 0, "an engine counts its own requests"
    sequences = [*llm.scheduler.running]
    llm.close()
    assert [seq.finish_reason for seq in sequences] == ["abort"] * 3
    stream.close()


def test_a_stop_string_that_the_last_token_completes_is_the_reason(llm: LLM) -> None:
    """Not the length, although no more tokens were allowed."""
    token_ids = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]["token_ids"]
    texts = [llm.tokenizer.decode(token_ids[:count]) for count in range(13)]
    count = next(n for n in range(3, 13) if texts[n].removeprefix(texts[n - 1]) not in texts[n - 1])
    params = SamplingParams.greedy(max_tokens=count, stop=texts[count].removeprefix(texts[count - 1]))
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    assert (output["text"], output["token_ids"]) == (texts[count - 1], token_ids[:count])
    assert output["finish_reason"] == "stop"


def test_a_stream_never_shows_a_part_of_a_stop_string(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], SamplingParams.greedy(max_tokens=40), use_tqdm=False)[0]["text"]
    stop = whole[20:30]
    stream = llm.generate_stream(PROMPTS[0], SamplingParams.greedy(max_tokens=40, stop=[stop, "no such text"]))
    assert "".join(item["text"] for item in stream) == whole[: whole.index(stop)]


def test_closing_a_stream_aborts_its_requests(llm: LLM) -> None:
    stream = llm.generate_stream(PROMPTS, SamplingParams.greedy(max_tokens=200))
    next(stream)
    stream.close()
    assert llm.is_finished()


def test_a_stream_that_is_never_read_queues_nothing(llm: LLM) -> None:
    llm.generate_stream(PROMPTS, GREEDY)
    assert llm.is_finished()


def test_streams_and_generate_side_by_side(llm: LLM) -> None:
    alone = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    stream = llm.generate_stream(PROMPTS[0], GREEDY)
    text = next(stream)["text"]
    seq_id = llm.add_request(PROMPTS[2], GREEDY)
    assert llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0]["text"] == alone[1]["text"]
    text += "".join(item["text"] for item in stream)
    assert text == alone[0]["text"]
    (output,) = llm.step().finished
    assert (output["seq_id"], output["text"]) == (seq_id, alone[2]["text"])


def test_a_stream_hands_out_its_own_requests_alone(llm: LLM) -> None:
    """D18: others run in the same steps, of another stream and of add_request."""
    params = SamplingParams.greedy(max_tokens=4)
    seq_id = llm.add_request(PROMPTS[2], params)
    other = llm.generate_stream(PROMPTS[1], params)
    items = [next(other)]
    own = list(llm.generate_stream(PROMPTS[0], params))
    assert len({item["seq_id"] for item in own}) == 1
    assert len(own) == sum(len(item["token_ids"]) for item in own) == 4
    items += other
    assert sum(len(item["token_ids"]) for item in items) == 4
    (output,) = llm.step().finished
    assert (output["seq_id"], len(output["token_ids"])) == (seq_id, 4)
