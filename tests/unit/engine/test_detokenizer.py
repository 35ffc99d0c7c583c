"""Detokenizer: what is streamed, joined, is what decoding everything at once gives, cut before a stop string."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm import bundled_model_path
from nanovllm.engine.detokenizer import Detokenizer, decode
from nanovllm.engine.tokenizer import load_tokenizer
from tests.support.counts import count_comparisons


class ByteTokenizer:
    """Token 0..255 is that byte, 256 is special; several bytes make a character. Counts the tokens it decodes."""

    def __init__(self) -> None:
        self.longest = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert clean_up_tokenization_spaces is False, "None would be the tokenizer's own default"
        self.longest = max(self.longest, len(token_ids))
        return bytes(token_id for token_id in token_ids if token_id < 256).decode("utf-8", errors="replace")


class WordTokenizer:
    """Looks back: a word has a space before it unless it is the first that is decoded."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return " ".join("abcdefgh"[token_id] for token_id in token_ids)


def stream(tokenizer: Any, token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    """What take() hands out after each token, and after the last once more."""
    detokenizer, pieces = Detokenizer(tokenizer, stop), []
    for token_id in token_ids:
        detokenizer.append(token_id)
        if detokenizer.is_stopped:
            break
        pieces.append(detokenizer.next_text(is_last=False))
    detokenizer.close()
    return [*pieces, detokenizer.next_text(is_last=True)], detokenizer


def spell(text: str) -> list[int]:
    return list(text.encode())


# Bytes of whole characters, of broken ones, and special tokens.
byte_tokens = st.one_of(
    st.text(alphabet="ab é€😀", max_size=12).map(spell),
    st.lists(st.sampled_from([97, 98, 256, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F]), max_size=20),
)


@given(token_ids=byte_tokens)
def test_the_pieces_joined_are_the_whole_text(token_ids: list[int]) -> None:
    pieces, detokenizer = stream(ByteTokenizer(), token_ids)
    assert "".join(pieces) == detokenizer.text == decode(ByteTokenizer(), token_ids)


@pytest.fixture(scope="module")
def bundled_tokenizer() -> Any:
    return load_tokenizer(bundled_model_path())


@given(token_ids=st.lists(st.integers(0, 511), max_size=40))
def test_the_pieces_joined_are_the_whole_text_of_the_bundled_tokenizer(
    bundled_tokenizer: Any, token_ids: list[int]
) -> None:
    pieces, _ = stream(bundled_tokenizer, token_ids)
    assert "".join(pieces) == decode(bundled_tokenizer, token_ids)
    count_comparisons("detokenizer: streamed tokens against the whole text", len(token_ids))


def test_a_real_text_streams_whole_characters(bundled_tokenizer: Any) -> None:
    text = "In the beginning — café, 5 €, 😀 — was the Word."
    pieces, _ = stream(bundled_tokenizer, bundled_tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


class SpaceStrippingTokenizer:
    """As SentencePiece: the space before a word is left out where decoding starts; token 9 is special."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(f" {'abcdefgh'[token_id]}" for token_id in token_ids if token_id != 9).removeprefix(" ")


def test_a_special_token_does_not_become_the_context() -> None:
    """Decoded behind a special token alone, the next word would lose the space before it."""
    pieces, detokenizer = stream(SpaceStrippingTokenizer(), [0, 9, 1, 9, 9, 2])
    assert "".join(pieces) == detokenizer.text == "a b c"


def test_a_character_waits_for_all_of_its_bytes() -> None:
    pieces, _ = stream(ByteTokenizer(), spell("a€b😀"))
    assert pieces == ["a", "", "", "€", "b", "", "", "", "😀", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    pieces, _ = stream(ByteTokenizer(), [97, 0xE2, 0x82])
    assert pieces == ["a", "", "", "\ufffd"]


def test_special_tokens_add_nothing() -> None:
    pieces, _ = stream(ByteTokenizer(), [97, 256, 98, 256])
    assert pieces == ["a", "", "b", "", ""]


def test_spaces_of_a_tokenizer_that_looks_back_are_kept() -> None:
    pieces, _ = stream(WordTokenizer(), [0, 1, 2, 3])
    assert pieces == ["a", " b", " c", " d", ""]


def test_only_the_last_tokens_are_decoded_again() -> None:
    """D82: time is linear in the text, since no call decodes more than a window of nine tokens."""
    tokenizer = ByteTokenizer()
    stream(tokenizer, spell("abc😀" * 50))
    assert tokenizer.longest <= 9


# --- stop strings ---


@given(
    text=st.text(alphabet="ab€", max_size=16),
    stop=st.text(alphabet="ab€", min_size=1, max_size=4),
)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: str) -> None:
    pieces, detokenizer = stream(ByteTokenizer(), spell(text), (stop,))
    expected = text.partition(stop)[0]
    assert detokenizer.is_stopped == (stop in text)
    assert detokenizer.text == expected
    assert "".join(pieces) == expected, "nothing of the stop string was handed out, and nothing held back is lost"


@given(
    text=st.text(alphabet="ab", max_size=16),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
@example(text="aab", stops=["b", "ab", "bb"])  # two are complete at once, and begin at different places
def test_with_several_stop_strings_the_one_that_is_complete_first_ends_the_text(text: str, stops: list[str]) -> None:
    """A token a character: the shortest beginning of the text that holds any of them."""
    pieces, detokenizer = stream(ByteTokenizer(), spell(text), tuple(stops))
    ends = [end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    seen = text[: ends[0]] if ends else text
    expected = min((seen.partition(stop)[0] for stop in stops), key=len)
    assert detokenizer.is_stopped == bool(ends)
    assert "".join(pieces) == detokenizer.text == expected


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    pieces, _ = stream(ByteTokenizer(), spell("xENEND!"), ("END!!",))
    assert pieces == ["x", "", "", "EN", "", "", "", "END!"]


def test_a_stop_string_within_one_token_cuts_inside_it() -> None:
    detokenizer = Detokenizer(WordTokenizer(), ("b c",))
    for token_id in (0, 1, 2):
        detokenizer.append(token_id)
    assert (detokenizer.text, detokenizer.is_stopped) == ("a ", True)


def test_a_stop_string_twice_within_one_token_cuts_at_the_first() -> None:
    class Tokenizer:
        def decode(self, token_ids: list[int], **_: Any) -> str:
            return "x#y#z" * len(token_ids)

    detokenizer = Detokenizer(Tokenizer(), ("#",))
    detokenizer.append(0)
    assert detokenizer.text == "x"
    assert detokenizer.next_text(is_last=False) == "x", "what is decided is not held back"


def test_closing_twice_adds_nothing() -> None:
    _, detokenizer = stream(ByteTokenizer(), [97, 0xE2])
    detokenizer.close()
    assert detokenizer.text == "a\ufffd"
    assert detokenizer.next_text(is_last=True) == ""
