"""Detokenizer: converts token ids to text.

Decoding all tokens at once (generate) and decoding them one by one (generate_stream) give the same text.
"""

import codecs
from collections.abc import Iterable, Sequence
from itertools import groupby, islice

from nanovllm.engine.stop_strings import stop_string_searches
from nanovllm.engine.token_decoder import TokenDecoder

_REPLACEMENT = "\ufffd"  # replaces invalid UTF-8 and an incomplete character
_NUM_CONTEXT_TOKENS = 4  # an incomplete character has at most three bytes, so at most three tokens
_MAX_WINDOW = 2 * _NUM_CONTEXT_TOKENS


class Detokenizer:
    """The generated text of one request. It continues the text of the prompt and ends before a stop string.

    stop: stop strings, see SamplingParams.
    prompt_token_ids: the prompt; its last tokens decide, for instance, whether the text begins with a space. If the
        prompt ends with an incomplete character and the text completes it, the character is part of the text.
    """

    def __init__(self, decoder: TokenDecoder, stop: Sequence[str] = (), prompt_token_ids: Sequence[int] = ()) -> None:
        self.is_stopped = False
        self._special_tokens = decoder.special_tokens
        self._incremental = _IncrementalDecoder(decoder, prompt_token_ids)
        self._searches = stop_string_searches(stop, decoder.special_tokens)
        self._emitted: list[str] = []  # pieces that next_text has returned
        self._pending: list[str] = []  # pieces that it has not: one string would be copied for every token
        self._num_emitted = self._num_characters = 0

    @property
    def text(self) -> str:
        """The text so far, without an incomplete character."""
        return "".join(self._emitted) + "".join(self._pending)

    def extend(self, token_ids: list[int]) -> None:
        """Add `token_ids` up to a stop string, with one call of the tokenizer if there are no stop strings.

        A complete stop string sets is_stopped and cuts the text.
        """
        if not self._searches:
            self._add_text(self._incremental.extend([i for i in token_ids if i not in self._special_tokens]))
            return
        for token_id in token_ids:
            if self.is_stopped:
                return
            if token_id in self._special_tokens:
                self._add_special_token(token_id)
            else:
                self._add_text(self._incremental.extend([token_id]))

    def close(self) -> None:
        """End the text: an incomplete character becomes one U+FFFD, as with bytes.decode(errors="replace")."""
        if not self.is_stopped:
            self._add_text(self._incremental.flush())

    def next_text(self, is_last: bool) -> str:
        """The text added since the last call. Text that may begin a stop string is held back unless is_last."""
        pending = "".join(self._pending)
        end = len(pending)
        if not is_last and not self.is_stopped:
            undecided = [position for search in self._searches if (position := search.first_undecided()) is not None]
            end = min([end, *(position - self._num_emitted for position in undecided)])
        self._emitted.append(pending[:end])
        self._pending = [pending[end:]]
        self._num_emitted += end
        return pending[:end]

    def _add_text(self, text: str) -> None:
        positions = range(self._num_characters, self._num_characters + len(text))
        self._num_characters += len(text)
        self._pending.append(text)
        self._cut_at(search.add(text, positions) for search in self._searches)

    def _add_special_token(self, token_id: int) -> None:
        """Search for stop strings that contain the token's text. The token ends an incomplete character."""
        searches = [search for search in self._searches if token_id in search.shown]
        if not searches:
            return
        self._add_text(self._incremental.flush())
        if not self.is_stopped:
            text = self._special_tokens[token_id]
            positions = [self._num_characters] * len(text)
            self._cut_at(search.add(text, positions) for search in searches)

    def _cut_at(self, cuts: Iterable[int | None]) -> None:
        """End the text at the first of `cuts`, the positions at which complete stop strings begin."""
        found = [cut for cut in cuts if cut is not None]
        if found:
            self._pending = ["".join(self._pending)[: min(found) - self._num_emitted]]
            self.is_stopped = True


class _IncrementalDecoder:
    """Decodes a growing list of tokens, without special tokens.

    For each new token, the tokenizer decodes a window of the last tokens. Only a U+FFFD at the end of the result may
    still change: it stands for all bytes of an incomplete character.
    Byte tokens of a byte-fallback vocabulary are decoded here and not by the tokenizers library, which replaces valid
    bytes next to an invalid one. In the window, a single ASCII letter replaces a run of byte tokens.
    """

    def __init__(self, decoder: TokenDecoder, prompt_token_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []
        self._window_text = ""
        self._num_settled = 0  # characters of _window_text that have been returned
        self._is_prompt_incomplete = False
        text_tokens = (token_id for token_id in reversed(prompt_token_ids) if token_id not in decoder.special_tokens)
        context = list(islice(text_tokens, _MAX_WINDOW))[::-1]
        if context:
            self.extend(context)
            self._is_prompt_incomplete = self._num_settled < len(self._window_text) or self._utf8.getstate()[0] != b""

    def extend(self, token_ids: list[int]) -> str:
        """The text that `token_ids` add. None of them may be a special token."""
        byte_tokens = self._decoder.byte_tokens
        text = ""
        for is_byte, group in groupby(token_ids, byte_tokens.__contains__):
            run = list(group)
            text += self._extend_bytes(run) if is_byte else self._extend_window(run)
        return self._without_end_of_prompt(text)

    def flush(self) -> str:
        """End the text. Returns U+FFFD if a character is incomplete, and an empty string otherwise."""
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
            return ""  # the tokenizer does not know these ids: they are neither text nor context
        self._window, self._window_text = window, window_text
        settled = len(window_text) - window_text.endswith(_REPLACEMENT)
        text = self._utf8.decode(b"", final=True) + window_text[self._num_settled : settled]
        self._num_settled = max(self._num_settled, settled)
        if len(window) > _MAX_WINDOW:
            is_incomplete = self._num_settled < len(window_text)
            self._start_window(window[-_NUM_CONTEXT_TOKENS:])
            self._num_settled = max(0, self._num_settled - is_incomplete)
        return text

    def _start_window(self, token_ids: list[int]) -> None:
        self._window, self._window_text = token_ids, self._decoder.decode(token_ids) if token_ids else ""
        self._num_settled = len(self._window_text)

    def _settle_window(self) -> str:
        """The part of the window's text that has not been returned. Later byte tokens cannot change it."""
        text = self._window_text[self._num_settled :]
        if text:
            self._start_window([])
        return text

    def _without_end_of_prompt(self, text: str) -> str:
        """`text` without the U+FFFD that the prompt's text ends with already."""
        if text and self._is_prompt_incomplete:
            self._is_prompt_incomplete = False
            return text.removeprefix(_REPLACEMENT)
        return text
