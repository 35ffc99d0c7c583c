"""Detokenizer with real tokenizers: the text is what follows the prompt's text, for generate and the stream alike."""

import copy
import itertools
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.token_decoder import TokenDecoder
from tests.support.counts import count_comparisons
from tests.unit.engine.test_detokenizer import decoder_of, stream
from tests.unit.engine.text_tokenizers import SPECIAL, KnownTokenizer, byte_fallback, byte_level, word_tokenizer

KINDS = {"byte-fallback": byte_fallback, "byte-level": byte_level}


@pytest.fixture(params=KINDS)
def known(request: pytest.FixtureRequest) -> KnownTokenizer:
    return KINDS[request.param]()


def at_once(tokenizer: Any, prompt: list[int], completion: list[int]) -> str:
    """As generate."""
    detokenizer = Detokenizer(decoder_of(tokenizer), (), prompt)
    detokenizer.extend(completion)
    detokenizer.close()
    return detokenizer.text


def check_text(tokenizer: Any, prompt: list[int], completion: list[int], text: str) -> None:
    assert at_once(tokenizer, prompt, completion) == text
    assert stream(tokenizer, completion, prompt=prompt)[1].text == text


def token_ids(known: KnownTokenizer, max_size: int) -> st.SearchStrategy[list[int]]:
    """Any tokens, and often those whose bytes make up characters, whole or in part, with special tokens between."""
    ids = {item: token_id for token_id, item in reversed(list(enumerate(known.token_bytes))) if item is not None}
    single = [bytes([byte]) for byte in (0x0A, 0x20, 0x41, 0x82, 0x99, 0x9F, 0xC3, 0xE2, 0xF0, 0xFF)]
    longer = [item for item in ids if len(item) > 1]
    special = [token_id for token_id, item in enumerate(known.token_bytes) if item is None]
    character = st.sampled_from(["🙂", "天", "é", "\n", "\ufffd"]).map(
        lambda text: [ids[bytes([byte])] for byte in text.encode()]
    )
    token = st.one_of(
        st.sampled_from([*(ids[item] for item in single + longer), *special]), st.sampled_from([*ids.values()])
    )
    parts = st.lists(st.one_of(token.map(lambda token_id: [token_id]), character), max_size=max_size)
    return parts.map(lambda lists: list(itertools.chain(*lists)))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_generate_and_stream_give_the_text_that_follows_the_prompt(kind: str, data: st.DataObject) -> None:
    """D82, D84: complete characters stay, and an incomplete one is what bytes.decode(errors="replace") makes of it."""
    known = KINDS[kind]()
    prompt, completion = data.draw(token_ids(known, 6)), data.draw(token_ids(known, 16))
    check_text(known.tokenizer, prompt, completion, known.text_after(prompt, completion))
    assert at_once(known.tokenizer, [], completion) == known.text(completion)
    count_comparisons("detokenizer: text of generate and of the stream against the bytes", len(completion))


def test_byte_tokens_are_those_that_decode_to_a_byte() -> None:
    """D82: other vocabularies have the unknown token for "<0x41>", or none, or these six characters."""
    known = byte_fallback()
    decoder = TokenDecoder(known.tokenizer)
    assert decoder.byte_tokens == {known.id_of(bytes([byte])): byte for byte in range(0x80, 0x100)}
    assert decoder.ascii_token == known.id_of(b"A")
    names = {name: token_id for token_id, name in enumerate(["<unk>", "<0x41>", "<0xE2>"])}
    literal = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    unknown = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    others = [PreTrainedTokenizerFast(tokenizer_object=item, unk_token="<unk>") for item in (literal, unknown)]
    for tokenizer in (*others, word_tokenizer(None), byte_level().tokenizer):
        decoder = TokenDecoder(tokenizer)
        assert (decoder.byte_tokens, decoder.ascii_token) == ({}, None)


def test_ids_that_the_tokenizer_does_not_know_are_left_out(known: KnownTokenizer) -> None:
    """A model's vocabulary may be larger than its tokenizer's: such an id does not part the bytes of a character."""
    unknown = len(known.token_bytes)
    parts = [[known.id_of(bytes([byte]))] for byte in "🙂".encode()]
    completion = [known.id_of(b" the"), *[token_id for part in parts for token_id in (*part, unknown, unknown)]]
    completion += [known.id_of(b" the"), unknown, known.id_of(b" a")]
    prompt = [known.id_of(b"b")]
    check_text(known.tokenizer, prompt, completion, " the🙂 the a")


@pytest.mark.parametrize("byte", [0xFF, 0x82, 0xF0])
def test_work_is_linear_in_the_number_of_invalid_bytes(known: KnownTokenizer, byte: int) -> None:
    """D82: counted in calls of decode and in tokens passed to it."""
    completion = [known.id_of(bytes([byte]))] * 2000
    tokenizer = copy.copy(known.tokenizer)
    tokenizer.decode = decode = mock.Mock(wraps=known.tokenizer.decode)
    detokenizer = Detokenizer(decoder_of(tokenizer))  # finds out about the tokenizer's byte tokens, once
    decode.reset_mock()
    for token_id in completion:
        detokenizer.extend([token_id])
        detokenizer.next_text(is_last=False)
    detokenizer.close()
    assert detokenizer.text == bytes([byte] * 2000).decode(errors="replace")
    assert 1 <= decode.call_count <= 3 * 2000
    assert sum(len(call.args[0]) for call in decode.call_args_list) <= 15 * 2000
    decode.reset_mock()
    assert at_once(tokenizer, [], completion) == detokenizer.text
    assert 1 <= decode.call_count <= 3, "tokens that come at once are decoded at once"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        # an incomplete character at the end of the prompt: the text has the whole one, and does not repeat U+FFFD
        ([b"\xf0", b"\x9f"], [b"\x99", b"\x82", b"b"], "🙂b"),
        ([b"\xf0", b"\x9f"], [b"b"], "b"),
        ([b"\xf0"], [b"\x9f"], ""),
        ([b"\xf0"], [], ""),
        ([b"\xef", b"\xbf", b"\xbd"], [b"b"], "b"),
        ([b"\xff"], [b"\xff", b"\xff"], "\ufffd\ufffd"),
        # at the end of the text: one U+FFFD
        ([b"b"], [b" the", b"\n", b"\xf0", b"\x9f", b"\x99"], " the\n\ufffd"),
        # a space is left out at the beginning of the whole alone
        ([b"b"], [b" the", b" a"], " the a"),
        ([b"b", "</s>"], [b" the"], " the"),
        (["<s>"], [b" the", b" a"], "the a"),
        ([], [b" the", b" a"], "the a"),
        ([b"\xe2", b"\x82"], [b" the"], " the"),
        (["<s>"], [b"\n", b" the"], "\n the"),
        (["<s>"], [b"\xc3", b"\xa9", b" the"], "é the"),
        (["<s>"], ["<|im_end|>", b" the", b" a"], "the a"),
    ],
)
def test_text_after_a_prompt(kind: str, prompt: list[Any], completion: list[Any], text: str) -> None:
    """D82, D84."""
    known = KINDS[kind]()
    if text.startswith("the") and not known.strips_first_space:
        text = f" {text}"
    prompt, completion = ([known.id_of(token) for token in tokens] for tokens in (prompt, completion))
    check_text(known.tokenizer, prompt, completion, text)


@pytest.mark.parametrize("decoder", ["Metaspace", "WordPiece", None])
@given(words=st.lists(st.integers(0, 4), min_size=1, max_size=24), num_prompt_words=st.integers(1, 12))
def test_text_of_other_decoders_follows_the_prompt(
    decoder: str | None, words: list[int], num_prompt_words: int
) -> None:
    """D84: decoders that put spaces between words, or none."""
    tokenizer = word_tokenizer(decoder)
    prompt, completion = words[:num_prompt_words], words[num_prompt_words:]
    before, whole = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (prompt, words))
    check_text(tokenizer, prompt, completion, whole.removeprefix(before))


# --- stop strings that contain special tokens ---


@pytest.mark.parametrize(
    ("completion", "stop", "text", "is_stopped"),
    [
        ([b"b", "<|im_end|>", b"b", b"\n"], ("<|im_end|>\n",), "bb\n", False),
        ([b"b", b"END", "<|im_end|>", b"b"], ("END<|im_end|>",), "b", True),
        ([b"b", b"END", "</s>", "<|im_end|>"], ("END</s><|im_end|>", "</s>b"), "b", True),
        ([b"b", "<|im_end|>", b"b"], ("<", "im_end", "|", "|>b"), "bb", False),  # part of a special token
        ([b"b", "<|im_end|>", b"END"], ("bEND",), "", True),  # in the text, from which special tokens are left out
        ([b"b", "<|im_end|>", b"END"], ("<|im_end|>b", "END"), "b", True),
        ([b"b", b"\xf0", b"\x9f", "<|im_end|>"], ("<|im_end|>",), "b\ufffd", True),
        ([b"b", b"\xf0", b"\x9f", "<|im_end|>", b"b", b"END"], ("<|im_end|>\n",), "b\ufffdbEND", False),
        ([b"b", "</s>", "<|im_end|>"], ("<|im_end|>", "b</s><|im_end|>"), "", True),  # two at once: the first to begin
        ([b"b", b"END", b"b"], ("END", "bENDb"), "b", True),  # the first to be complete
        ([b"<", b"b", b">", "</s>"], ("<b></s>",), "", True),
    ],
)
def test_stop_strings_with_special_tokens(
    known: KnownTokenizer, completion: list[Any], stop: tuple[str, ...], text: str, is_stopped: bool
) -> None:
    """D83: a stop string is found with the special tokens that it contains written out, and others left out."""
    completion = [known.id_of(token) for token in completion]
    detokenizer = Detokenizer(decoder_of(known.tokenizer), stop, [known.id_of(b"b")])
    detokenizer.extend(completion)
    detokenizer.close()
    assert (detokenizer.text, detokenizer.is_stopped) == (text, is_stopped)
    assert stream(known.tokenizer, completion, stop, [known.id_of(b"b")])[1].text == text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_text_ends_before_the_first_stop_string(kind: str, data: st.DataObject) -> None:
    """D83: against the definition, on tokens without incomplete characters."""
    known = KINDS[kind]()
    tokens = data.draw(st.lists(st.sampled_from([b"b", b"\n", b"END", "<|im_end|>", "</s>"]), max_size=12))
    parts = st.lists(st.sampled_from(["b", "\n", "E", "ND", "<|im_end|>"]), min_size=1, max_size=3)
    stop = data.draw(parts.map("".join))
    shown = [name for name in SPECIAL if name in stop]
    names = [token if isinstance(token, str) else token.decode() for token in tokens]
    view = "".join(name for name in names if name not in SPECIAL or name in shown)
    expected = view.partition(stop)[0]
    for name in shown:
        expected = expected.replace(name, "")
    completion = [known.id_of(token) for token in tokens]
    assert stream(known.tokenizer, completion, (stop,), [known.id_of(b"b")])[1].text == expected
