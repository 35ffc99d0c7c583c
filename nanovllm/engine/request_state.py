"""RequestState: what the engine keeps of one request beside its Sequence: its text, and who collects its output."""

from typing import Any

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput, StreamOutput


class RequestState:
    """One request from add_request to its output.

    index: of its prompt in the list given to generate or generate_stream; None when it came through add_request, and
        step() hands out its output.
    tokenizer: None when the checkpoint has none; then the text is empty.
    is_streamed: whether next_stream_output will be called; the text then grows with each token. Otherwise only stop
        strings need it to.
    """

    def __init__(self, sequence: Sequence, tokenizer: Any, index: int | None, is_streamed: bool) -> None:
        self.sequence = sequence
        self.index = index
        self.is_stream_finished = False  # whether next_stream_output has given the item that says how the request ended
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        self._num_taken_tokens = 0
        if tokenizer is not None and (is_streamed or sequence.sampling_params.stop):
            self._detokenizer = self._make_detokenizer()

    def process_new_token(self) -> bool:
        """Take in the sequence's last token. True if it completed a stop string."""
        if self._detokenizer is None or self._is_last_token_hidden():
            return False
        self._detokenizer.append(self.sequence.last_token)
        return self._detokenizer.is_stopped

    def output(self) -> RequestOutput:
        """The result of a finished request."""
        seq = self.sequence
        assert seq.finish_reason is not None
        return RequestOutput(
            text=self._text(),
            token_ids=seq.completion_token_ids,
            finish_reason=seq.finish_reason,
            num_cached_tokens=seq.num_cached_prompt_tokens or 0,
            seq_id=seq.seq_id,
        )

    def next_stream_output(self) -> StreamOutput:
        """What has come since the last call."""
        seq = self.sequence
        token_ids = seq.completion_token_ids[self._num_taken_tokens :]
        self._num_taken_tokens += len(token_ids)
        self.is_stream_finished = seq.is_finished
        text = ""
        if self._detokenizer is not None:
            if seq.is_finished:
                self._detokenizer.close()
            text = self._detokenizer.take(is_last=seq.is_finished)
        assert self.index is not None
        return StreamOutput(
            index=self.index, text=text, token_ids=token_ids, finish_reason=seq.finish_reason, seq_id=seq.seq_id
        )

    def _make_detokenizer(self) -> Detokenizer:
        seq = self.sequence
        return Detokenizer(self._tokenizer, seq.sampling_params.stop, seq.prompt_token_ids)

    def _text(self) -> str:
        if self._tokenizer is None:
            return ""
        if self._detokenizer is None:
            token_ids = self.sequence.completion_token_ids
            is_last_hidden = self._is_last_token_hidden()
            self._detokenizer = self._make_detokenizer()
            self._detokenizer.extend(token_ids[:-1] if is_last_hidden else token_ids)
        self._detokenizer.close()
        return self._detokenizer.text

    def _is_last_token_hidden(self) -> bool:
        """A token that ended the request (end of sequence, stop token) is no part of the text."""
        seq = self.sequence
        is_stop_string = self._detokenizer is not None and self._detokenizer.is_stopped
        return seq.finish_reason == "stop" and not is_stop_string
