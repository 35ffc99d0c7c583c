"""RequestState: the data of a request besides its Sequence: its text, and how much of it was streamed."""

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.token_decoder import TokenDecoder
from nanovllm.outputs import RequestOutput, StreamOutput


class RequestState:
    """One request from its arrival to its output.

    decoder: None if the checkpoint has no tokenizer; the text is empty then.
    index: position of the prompt in the list given to generate or generate_stream.
    is_stream_finished: whether next_stream_output has returned the item with the finish_reason.
    """

    def __init__(self, sequence: Sequence, decoder: TokenDecoder | None, index: int = 0) -> None:
        self.sequence = sequence
        self.index = index
        self.is_stream_finished = False
        self._decoder = decoder
        self._detokenizer: Detokenizer | None = None
        self._num_decoded_tokens = self._num_streamed_tokens = sequence.num_prompt_tokens

    def process_new_token(self) -> bool:
        """Decode the sequence's new token. Returns whether it completes a stop string."""
        detokenizer = self._decode_new_tokens()
        return detokenizer is not None and detokenizer.is_stopped

    def output(self) -> RequestOutput:
        """The output of a finished request."""
        seq, detokenizer = self.sequence, self._decode_new_tokens()
        assert seq.finish_reason is not None
        return RequestOutput(
            text="" if detokenizer is None else detokenizer.text,
            token_ids=seq.completion_token_ids,
            finish_reason=seq.finish_reason,
            num_cached_tokens=seq.num_cached_prompt_tokens or 0,
            seq_id=seq.seq_id,
        )

    def next_stream_output(self) -> StreamOutput:
        """The text and tokens since the last call."""
        seq = self.sequence
        token_ids = seq.token_ids[self._num_streamed_tokens :]
        self._num_streamed_tokens = seq.num_tokens
        self.is_stream_finished = seq.is_finished
        detokenizer = self._decode_new_tokens()
        text = "" if detokenizer is None else detokenizer.next_text(is_last=seq.is_finished)
        return StreamOutput(
            index=self.index, text=text, token_ids=token_ids, finish_reason=seq.finish_reason, seq_id=seq.seq_id
        )

    def _decode_new_tokens(self) -> Detokenizer | None:
        """Pass the tokens since the last call to the detokenizer, which is made at the first call.

        It is closed once the request has finished.
        """
        seq = self.sequence
        if self._decoder is None:
            return None
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self._decoder, seq.sampling_params.stop, seq.prompt_token_ids)
        is_last_hidden = seq.finish_cause is not None and seq.finish_cause.hides_last_token
        end = seq.num_tokens - is_last_hidden
        if end > self._num_decoded_tokens:
            self._detokenizer.extend(seq.token_ids[self._num_decoded_tokens : end])
            self._num_decoded_tokens = end
        if seq.is_finished:
            self._detokenizer.close()
        return self._detokenizer
