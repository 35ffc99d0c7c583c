"""RequestState: the text of a request, what ends it, and what is streamed of it."""

from typing import Any

import pytest

from nanovllm.engine.request_state import RequestState
from nanovllm.engine.sequence import FinishCause
from nanovllm.engine.token_decoder import TokenDecoder
from tests.support.scheduling import make_scheduler, make_sequence
from tests.unit.engine.test_detokenizer import ByteTokenizer


def generated(
    text: str, decoder: TokenDecoder | None = None, prompt: str = "??", **params: Any
) -> tuple[RequestState, list[dict[str, Any]]]:
    """A request whose model generates the letters of `text`, and its stream; "." and "," end a sequence."""
    scheduler = make_scheduler(eos_token_ids=frozenset({ord("."), ord(",")}))
    seq = make_sequence([*map(ord, prompt)], **{"max_tokens": len(text), **params})
    request, streamed = RequestState(seq, decoder, 3), RequestState(seq, decoder, 3)
    scheduler.add(seq)
    items: list[Any] = []
    while not scheduler.is_finished:
        tokens = [ord(text[seq.num_completion_tokens])]
        scheduler.postprocess(scheduler.schedule(), tokens, lambda _: request.process_new_token())
        items.append(streamed.next_stream_output())
    assert streamed.is_stream_finished
    return request, items


@pytest.mark.parametrize(
    ("said", "params", "text", "num_tokens", "cause"),
    [
        ("abc", {}, "abc", 3, FinishCause.LENGTH),
        ("ab.cd", {}, "ab", 3, FinishCause.EOS_TOKEN),
        ("ab,cd", {}, "ab", 3, FinishCause.EOS_TOKEN),
        ("ab.cd", {"ignore_eos": True}, "ab.cd", 5, FinishCause.LENGTH),
        ("abxcd", {"stop_token_ids": (ord("x"),)}, "ab", 3, FinishCause.STOP_TOKEN),
        ("abENDcd", {"stop": "END"}, "ab", 5, FinishCause.STOP_STRING),
        ("abEN.", {"stop": "END"}, "abEN", 5, FinishCause.EOS_TOKEN),
        ("abENcd", {"stop": "END", "max_tokens": 4}, "abEN", 4, FinishCause.LENGTH),
        # several causes at once
        ("a.", {"stop_token_ids": (ord("."),), "stop": "."}, "a", 2, FinishCause.EOS_TOKEN),
        ("a.", {"stop_token_ids": (ord("."),), "stop": ".", "ignore_eos": True}, "a", 2, FinishCause.STOP_TOKEN),
        ("abEND", {"stop": "END"}, "ab", 5, FinishCause.STOP_STRING),
        ("a\xe2\x82", {}, "a\ufffd", 3, FinishCause.LENGTH),  # two bytes of three
        ("a\xe2\x82", {"stop": "no such text"}, "a\ufffd", 3, FinishCause.LENGTH),
    ],
)
def test_text_tokens_and_cause(
    said: str, params: dict[str, Any], text: str, num_tokens: int, cause: FinishCause
) -> None:
    """D70. A token that ends the request is not in its text. The stream, joined, is the output."""
    request, items = generated(said, TokenDecoder(ByteTokenizer()), **params)
    assert request.sequence.finish_cause is cause
    output = request.output()
    assert output == request.output()
    assert (output["text"], output["finish_reason"]) == (text, cause.reason)
    assert output["token_ids"] == [ord(letter) for letter in said[:num_tokens]]
    assert (output["seq_id"], output["num_cached_tokens"]) == (0, 0)
    assert "".join(item["text"] for item in items) == text
    assert [token_id for item in items for token_id in item["token_ids"]] == output["token_ids"]
    assert [item["finish_reason"] for item in items] == [None] * (len(items) - 1) + [cause.reason]
    assert {(item["index"], item["seq_id"]) for item in items} == {(3, 0)}


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    request, items = generated("abc")
    assert (request.output()["text"], request.output()["token_ids"]) == ("", [97, 98, 99])
    assert [(item["text"], item["token_ids"]) for item in items] == [("", [97]), ("", [98]), ("", [99])]


def test_tokens_of_several_steps_are_streamed_together_and_text_is_held_back_until_the_end() -> None:
    request = RequestState(make_sequence([1], stop="END"), TokenDecoder(ByteTokenizer()))
    texts = []
    for letters in ("ab", "E", ""):
        for letter in letters:
            request.sequence.append_token(ord(letter))
        texts.append(request.next_stream_output()["text"])
    request.sequence.finish_cause = FinishCause.LENGTH
    request.sequence.status = request.sequence.status.FINISHED
    assert [*texts, request.next_stream_output()["text"]] == ["ab", "", "", "E"]


def test_the_text_continues_the_prompts() -> None:
    """Here with the last byte of three, of which the prompt has two."""
    request, _ = generated("\xacb", TokenDecoder(ByteTokenizer()), prompt="a\xe2\x82")
    assert request.output()["text"] == "\u20acb"
