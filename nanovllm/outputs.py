"""What the engine gives back."""

from dataclasses import dataclass
from typing import Literal, TypedDict

FinishReason = Literal["stop", "length", "abort"]


class RequestOutput(TypedDict):
    """One finished request.

    text: the generated text, special tokens and the stop string left out. It continues the prompt's text: it begins
        with a space if its first word does. A character of which the last bytes are missing is one U+FFFD, as with
        bytes.decode(errors="replace"). Empty without a tokenizer.
    token_ids: the generated tokens, an end-of-sequence token included.
    finish_reason: "stop" (end-of-sequence token, stop token or stop string), "length" (max_tokens or max_model_len),
        "abort".
    num_cached_tokens: how many tokens of the prompt were found in the prefix cache when the request was admitted.
    seq_id: the id that add_request returned.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_cached_tokens: int
    seq_id: int


class StreamOutput(TypedDict):
    """What one step added to one request.

    index: the prompt's index in the list given to generate_stream.
    text: the new text; the texts of a request, joined, are RequestOutput's text.
    token_ids: the new tokens (empty when an abort ends the request).
    finish_reason: None until the request's last item.
    seq_id: of the request, for abort.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    seq_id: int


@dataclass(frozen=True)
class StepOutput:
    """What LLMEngine.step did.

    finished: the requests that ended, in order of arrival.
    num_prefill_tokens, num_decode_tokens: tokens computed; one of the two is 0.
    """

    finished: tuple[RequestOutput, ...]
    num_prefill_tokens: int
    num_decode_tokens: int
