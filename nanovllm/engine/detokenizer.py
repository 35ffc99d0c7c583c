"""Detokenizer: token ids -> text, for generate (all tokens at once) and generate_stream (one by one) alike."""

import codecs
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nanovllm.engine.stop_strings import stop_string_searches
from nanovllm.engine.token_decoder import TokenDecoder, token_decoder

_REPLACEMENT = "\ufffd"  # stands for bytes that are no character, or not yet
_NUM_CONTEXT_TOKENS = 4  # an incomplete character has at most three bytes, so it begins within the last three tokens
_MAX_WINDOW = 2 * _NUM_CONTEXT_TOKENS


def decode(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of `token_ids` without a prompt, special tokens left out, spaces as they are."""
    detokenizer = Detokenizer(tokenizer)
    detokenizer.extend(token_ids)
    detokenizer.close()
    return detokenizer.text


class Detokenizer:
    """The text of one request: what follows the text of its prompt, cut before a stop string.

    tokenizer: of transformers, or any object with its `decode`.
    stop: stop strings, see SamplingParams.
    prompt_token_ids: the prompt; its last tokens decide whether the text begins with a space, for instance. A character
        that the prompt leaves incomplete belongs to this text if the text completes it, and otherwise to the prompt's.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt_token_ids: Sequence[int] = ()) -> None:
        self.is_stopped = False
        decoder = token_decoder(tokenizer)
        self._special_tokens = decoder.special_tokens
        self._incremental = _IncrementalDecoder(decoder, prompt_token_ids)
        self._searches = stop_string_searches(stop, decoder.special_tokens) if stop else []
        self._taken: list[str] = []
        self._untaken: list[str] = []
        self._num_taken = self._num_characters = 0

    @property
    def text(self) -> str:
        """The text so far, without the bytes of an incomplete character."""
        return "".join(self._taken) + "".join(self._untaken)

    def append(self, token_id: int) -> None:
        """Add one token. Sets is_stopped, and cuts the text, when a stop string is complete."""
        if token_id in self._special_tokens:
            self._add_special_token(token_id)
        else:
            self._add_text(self._incremental.extend([token_id]))

    def extend(self, token_ids: list[int]) -> None:
        """As append for each of `token_ids` up to a stop string, with one call of the tokenizer where possible."""
        if not self._searches:
            self._add_text(self._incremental.extend([i for i in token_ids if i not in self._special_tokens]))
            return
        for token_id in token_ids:
            self.append(token_id)
            if self.is_stopped:
                return

    def close(self) -> None:
        """End the text: an incomplete character becomes one U+FFFD, as with bytes.decode(errors="replace")."""
        if not self.is_stopped:
            self._add_text(self._incremental.flush())

    def take(self, is_last: bool) -> str:
        """Text not handed out yet. Until the last call, what may be the beginning of a stop string is held back."""
        untaken = "".join(self._untaken)
        end = len(untaken)
        if not is_last and not self.is_stopped:
            undecided = [position for search in self._searches if (position := search.first_undecided()) is not None]
            end = min([end, *(position - self._num_taken for position in undecided)])
        self._taken.append(untaken[:end])
        self._untaken = [untaken[end:]]
        self._num_taken += end
        return untaken[:end]

    def _add_text(self, text: str) -> None:
        if not text:
            return
        begin = self._num_characters
        self._num_characters += len(text)
        self._untaken.append(text)
        self._cut_at([search.add(text, range(begin, self._num_characters)) for search in self._searches])

    def _add_special_token(self, token_id: int) -> None:
        """Written out in a view, a special token ends an incomplete character as any other text does."""
        searches = [search for search in self._searches if token_id in search.shown]
        if not searches:
            return
        self._add_text(self._incremental.flush())
        if not self.is_stopped:
            found = [(search.shown[token_id], search) for search in searches]
            self._cut_at([search.add(text, [self._num_characters] * len(text)) for text, search in found])

    def _cut_at(self, positions: list[int | None]) -> None:
        """End the text at the first of `positions`, where stop strings begin; None is no stop string."""
        cuts = [position for position in positions if position is not None]
        if cuts:
            self._untaken = ["".join(self._untaken)[: min(cuts) - self._num_taken]]
            self.is_stopped = True


class _IncrementalDecoder:
    """Text of a growing list of tokens, special tokens left out. Each token is decoded with a few before it.

    The tokenizer decodes a window of the last tokens again for each new one. Only a U+FFFD at the end of the result
    may still change: it stands for all bytes of an incomplete character. The tokenizers library replaces each byte of a
    byte-fallback vocabulary if one of its neighbours is wrong; so these bytes are decoded here, and one letter takes
    their place in the window.
    """

    def __init__(self, decoder: TokenDecoder, prompt_token_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []
        self._window_text = ""
        self._num_settled = 0  # characters of _window_text that were returned
        self._is_prompt_incomplete = False
        context = _last_text_tokens(prompt_token_ids, decoder)
        if context:
            self.extend(context)
            self._is_prompt_incomplete = self._num_settled < len(self._window_text) or self._utf8.getstate()[0] != b""

    def extend(self, token_ids: list[int]) -> str:
        """Text that `token_ids` (no special tokens) add."""
        byte_tokens = self._decoder.byte_tokens
        text = ""
        for is_byte, group in groupby(token_ids, byte_tokens.__contains__):
            run = list(group)
            text += self._extend_bytes(run) if is_byte else self._extend_window(run)
        return self._without_end_of_prompt(text)

    def flush(self) -> str:
        """The U+FFFD of an incomplete character, or nothing."""
        return self._without_end_of_prompt(self._settle_window() + self._utf8.decode(b"", final=True))

    def _extend_bytes(self, token_ids: list[int]) -> str:
        values = bytes(self._decoder.byte_tokens[token_id] for token_id in token_ids)
        text = self._settle_window() + self._utf8.decode(values)
        assert self._decoder.ascii_token is not None
        if self._window != [self._decoder.ascii_token]:
            self._start_window([self._decoder.ascii_token])
        return text

    def _extend_window(self, token_ids: list[int]) -> str:
        window = self._window + token_ids
        window_text = self._decoder.decode(window)
        if self._window and window_text == self._window_text and not self._decoder.decode(token_ids):
            return ""  # ids that the tokenizer does not know are neither text nor context
        self._window, self._window_text = window, window_text
        settled = len(window_text) - window_text.endswith(_REPLACEMENT)
        text = self._utf8.decode(b"", final=True) + window_text[self._num_settled : settled]
        self._num_settled = max(self._num_settled, settled)
        if len(window) > _MAX_WINDOW:
            self._shorten_window()
        return text

    def _shorten_window(self) -> None:
        is_incomplete = self._num_settled < len(self._window_text)
        self._start_window(self._window[-_NUM_CONTEXT_TOKENS:])
        self._num_settled = max(0, self._num_settled - is_incomplete)

    def _start_window(self, token_ids: list[int]) -> None:
        self._window, self._window_text = token_ids, self._decoder.decode(token_ids) if token_ids else ""
        self._num_settled = len(self._window_text)

    def _settle_window(self) -> str:
        """Text of the window that was not returned yet. Bytes that follow it no longer change it."""
        text = self._window_text[self._num_settled :]
        if text:
            self._start_window([])
        return text

    def _without_end_of_prompt(self, text: str) -> str:
        """The U+FFFD at the end of the prompt's text is not repeated."""
        if text and self._is_prompt_incomplete:
            self._is_prompt_incomplete = False
            return text.removeprefix(_REPLACEMENT)
        return text


def _last_text_tokens(token_ids: Sequence[int], decoder: TokenDecoder) -> list[int]:
    """The last tokens, in order, that are not special; at most as many as a window holds."""
    tokens: list[int] = []
    for token_id in reversed(token_ids):
        if len(tokens) == _MAX_WINDOW:
            break
        if token_id not in decoder.special_tokens:
            tokens.append(token_id)
    return tokens[::-1]
