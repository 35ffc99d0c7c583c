"""Detokenizer: stop strings and held-back text. test_text_of_tokenizers.py has real tokenizers."""

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.stop_strings import StopStringSearch
from nanovllm.engine.token_decoder import TokenDecoder

decoder_of = functools.lru_cache(maxsize=8)(TokenDecoder)


class ByteTokenizer:
    """Token 0..255 is that byte, 256 is special; several bytes make a character."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert clean_up_tokenization_spaces is False, "None would be the tokenizer's own default"
        return bytes(token_id for token_id in token_ids if token_id < 256).decode("utf-8", errors="replace")


class WordTokenizer:
    """Puts a space before each word but the first one that is decoded. The last word repeats a letter."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return " ".join(["a", "b", "c", "x#y#z"][token_id] for token_id in token_ids)


def stream(
    tokenizer: Any, token_ids: list[int], stop: tuple[str, ...] = (), prompt: Sequence[int] = ()
) -> tuple[list[str], Detokenizer]:
    """The text after each token, and at the end, as generate_stream yields it."""
    detokenizer, pieces = Detokenizer(decoder_of(tokenizer), stop, prompt), []
    for token_id in token_ids:
        detokenizer.extend([token_id])
        if detokenizer.is_stopped:
            break
        pieces.append(detokenizer.next_text(is_last=False))
    detokenizer.close()
    pieces.append(detokenizer.next_text(is_last=True))
    assert "".join(pieces) == detokenizer.text
    return pieces, detokenizer


def spell(text: str) -> list[int]:
    return list(text.encode())


def test_a_character_waits_for_all_of_its_bytes() -> None:
    pieces, detokenizer = stream(ByteTokenizer(), [*spell("a€😀"), 256, *spell("é")[:1]])
    assert pieces == ["a", "", "", "€", "", "", "", "😀", "", "", "\ufffd"]
    detokenizer.close()
    assert (detokenizer.text, detokenizer.next_text(is_last=True)) == ("a€😀\ufffd", ""), "closing twice adds nothing"


@given(
    text=st.text(alphabet="ab€", max_size=16),
    stops=st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), min_size=1, max_size=3),
)
@example(text="aab", stops=["b", "ab", "bb"])  # two are complete at once, and begin at different places
def test_the_first_complete_stop_string_ends_the_text(text: str, stops: list[str]) -> None:
    """It is the first in the shortest beginning of the text that holds any. All text before it is streamed."""
    _, detokenizer = stream(ByteTokenizer(), spell(text), tuple(stops))
    ends = [end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    seen = text[: ends[0]] if ends else text
    expected = min((seen.partition(stop)[0] for stop in stops), key=len)
    assert detokenizer.is_stopped == bool(ends)
    assert detokenizer.text == expected


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    pieces, _ = stream(ByteTokenizer(), spell("xENEND!"), ("END!!",))
    assert pieces == ["x", "", "", "EN", "", "", "", "END!"]


def test_a_stop_string_within_a_token_cuts_it_at_its_first_occurrence() -> None:
    assert stream(WordTokenizer(), [0, 1, 2], ("b c",))[1].text == "a "
    detokenizer = Detokenizer(TokenDecoder(WordTokenizer()), ("#",))
    detokenizer.extend([3])
    assert (detokenizer.text, detokenizer.is_stopped) == ("x", True)
    assert detokenizer.next_text(is_last=False) == "x", "decided text is not held back"


def test_a_search_keeps_no_more_text_than_may_begin_a_stop_string() -> None:
    """So a token costs the same however long the text before it is."""
    search = StopStringSearch(["END", "E"], {})
    for count in range(20):
        assert search.add("abc", range(3 * count, 3 * count + 3)) is None
        assert len(search._view) == len(search._positions) == 2
    assert search.add("xE", (60, 61)) == 61
