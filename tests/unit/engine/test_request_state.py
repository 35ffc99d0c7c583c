"""RequestState: the text of a request, what ends it, and what is streamed of it."""

from typing import Any

import pytest

from nanovllm.engine.request_state import RequestState
from nanovllm.engine.sequence import FinishCause, Sequence, SequenceStatus
from tests.support.scheduling import make_scheduler, make_sequence, run


class LetterTokenizer:
    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(chr(token_id) for token_id in token_ids)


class ByteTokenizer:
    def decode(self, token_ids: list[int], **_: Any) -> str:
        return bytes(token_ids).decode(errors="replace")


def generated(text: str, is_streamed: bool = False, tokenizer: Any = LetterTokenizer(), **params: Any) -> RequestState:  # noqa: B008
    """A request whose model says `text`; "." is the end-of-sequence token. Ends at a stop string as the engine does."""
    scheduler = make_scheduler(eos_token_ids=frozenset({ord(".")}))
    seq = make_sequence([1, 2], max_tokens=params.pop("max_tokens", len(text)), **params)
    request = RequestState(seq, tokenizer, 0, is_streamed)
    scheduler.add(seq)

    def token(seq: Sequence) -> int:
        return ord(text[seq.num_completion_tokens])

    while not scheduler.is_finished:
        batch = scheduler.schedule()
        scheduler.postprocess(batch, [token(item) for item in batch.sampled_sequences])
        if request.process_new_token() and not seq.is_finished:
            scheduler.finish(seq, FinishCause.STOP_STRING)
    run(scheduler)
    return request


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("said", "params", "text", "num_tokens", "reason"),
    [
        ("abc", {}, "abc", 3, "length"),
        ("ab.cd", {}, "ab", 3, "stop"),
        ("ab.cd", {"ignore_eos": True}, "ab.cd", 5, "length"),
        ("abxcd", {"stop_token_ids": (ord("x"),)}, "ab", 3, "stop"),
        ("abENDcd", {"stop": "END"}, "ab", 5, "stop"),
        ("abEN.", {"stop": "END"}, "abEN", 5, "stop"),
        ("abENcd", {"stop": "END", "max_tokens": 4}, "abEN", 4, "length"),
    ],
)
def test_text_tokens_and_reason(
    said: str, params: dict[str, Any], text: str, num_tokens: int, reason: str, is_streamed: bool
) -> None:
    """A token that ends the request is among the tokens and not in the text; a stop string is in neither's text."""
    output = generated(said, is_streamed, **params).output()
    assert (output["text"], output["finish_reason"]) == (text, reason)
    assert output["token_ids"] == [ord(letter) for letter in said[:num_tokens]]
    assert (output["seq_id"], output["num_cached_tokens"]) == (0, 0)


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    output = generated("abc", tokenizer=None).output()
    assert (output["text"], output["token_ids"]) == ("", [97, 98, 99])


def test_without_a_tokenizer_a_stream_has_tokens_and_no_text() -> None:
    item = generated("abc", tokenizer=None, is_streamed=True).next_stream_output()
    assert (item["text"], item["token_ids"], item["seq_id"]) == ("", [97, 98, 99], 0)


def test_streamed_pieces_join_to_the_output() -> None:
    request = RequestState(make_sequence([1], stop="END"), LetterTokenizer(), 3, is_streamed=True)
    items = []
    for letter in "abE":
        request.sequence.append_token(ord(letter))
        request.process_new_token()
        items.append(request.next_stream_output())
    request.sequence.status, request.sequence.finish_reason = SequenceStatus.FINISHED, "length"
    items.append(request.next_stream_output())
    assert [(item["index"], item["text"], item["token_ids"], item["finish_reason"]) for item in items] == [
        (3, "a", [97], None),
        (3, "b", [98], None),
        (3, "", [69], None),
        (3, "E", [], "length"),
    ]


@pytest.mark.parametrize("params", [{}, {"stop": "no such text"}])
def test_a_character_that_is_never_whole_is_shown_at_the_end(params: dict[str, Any]) -> None:
    """Streamed or not, and whether or not the text was followed for stop strings."""
    said = "a\xe2\x82"  # the first two bytes of three
    assert generated(said, tokenizer=ByteTokenizer(), **params).output()["text"] == "a\ufffd"
    request = generated(said, is_streamed=True, tokenizer=ByteTokenizer(), **params)
    assert request.next_stream_output()["text"] == "a\ufffd"
    assert request.output()["text"] == "a\ufffd"


def test_an_abort_is_streamed_without_tokens() -> None:
    scheduler = make_scheduler()
    seq = make_sequence([1])
    scheduler.add(seq)
    request = RequestState(seq, LetterTokenizer(), 0, is_streamed=True)
    scheduler.abort(0)
    item = request.next_stream_output()
    assert (item["text"], item["token_ids"], item["finish_reason"]) == ("", [], "abort")
