"""Detokenizer: token ids -> text as they arrive, cut before a stop string."""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what decoding puts in place of bytes that are not (yet) a whole character


def decode(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of `token_ids`, special tokens left out, spaces as they are."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """The text of one request, growing with each token.

    Only the last few tokens are decoded again for each new one: decoding starts at a token before which the text is
    settled, and what ends in the middle of a character waits for the rest of its bytes.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._token_ids: list[int] = []
        self._start = 0  # decoding starts here: one settled piece of context for tokenizers that look back
        self._settled = 0  # tokens before it are in the text
        self._num_taken = 0  # characters handed out by take

    def append(self, token_id: int) -> None:
        """Take in one more token. Sets is_stopped, and cuts the text, when a stop string is complete."""
        self._token_ids.append(token_id)
        self._extend_text(is_last=False)

    def close(self) -> None:
        """No more tokens: what is left of an incomplete character joins the text."""
        if not self.is_stopped:
            self._extend_text(is_last=True)

    def take(self, is_last: bool) -> str:
        """Text not handed out yet. Until the last call, what may be the beginning of a stop string is held back."""
        end = len(self.text) if is_last else len(self.text) - self._num_held_back()
        new = self.text[self._num_taken : end]
        self._num_taken = max(self._num_taken, end)
        return new

    def _extend_text(self, is_last: bool) -> None:
        context = decode(self._tokenizer, self._token_ids[self._start : self._settled])
        text = decode(self._tokenizer, self._token_ids[self._start :])
        if len(text) <= len(context) or (text.endswith(_INCOMPLETE) and not is_last):
            return
        num_old = len(self.text)
        self.text += text[len(context) :]
        self._start, self._settled = self._settled, len(self._token_ids)
        self._cut_at_stop_string(num_old)

    def _cut_at_stop_string(self, num_old: int) -> None:
        """The new text may complete a stop string that began in the old."""
        found = [self.text.find(stop, max(0, num_old - len(stop) + 1)) for stop in self._stop]
        cuts = [position for position in found if position >= 0]
        if cuts:
            self.text = self.text[: min(cuts)]
            self.is_stopped = True

    def _num_held_back(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        if self.is_stopped:
            return 0
        lengths = range(max(map(len, self._stop), default=0) - 1, 0, -1)
        for length in lengths:
            end = self.text[-length:]
            if len(end) == length and any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
