"""RequestOutput, StreamOutput, StepOutput: the results of an engine."""

from dataclasses import dataclass
from typing import Literal, TypedDict

FinishReason = Literal["stop", "length", "abort"]


class RequestOutput(TypedDict):
    """One finished request.

    text: the generated text, without special tokens and stop string. It continues the text of the prompt, so it begins
        with a space if its first word does. An incomplete character at the end is one U+FFFD, as with
        bytes.decode(errors="replace"). Empty without a tokenizer.
    token_ids: the generated tokens, including an end-of-sequence token.
    finish_reason: "abort", "stop" (end-of-sequence token, stop token or stop string) or "length" (max_tokens or
        max_model_len). Where several apply, it is the first of these.
    num_cached_tokens: tokens of the prompt that were found in the prefix cache when the request was admitted.
    seq_id: the id that add_request returned.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_cached_tokens: int
    seq_id: int


class StreamOutput(TypedDict):
    """The text and tokens that a step added to a request.

    index: the prompt's index in the list given to generate_stream.
    text: the new text. The joined texts of a request are the text of RequestOutput.
    token_ids: the new tokens; empty if the request was aborted.
    finish_reason: None except in the last item of the request.
    seq_id: the id of the request, for abort.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    seq_id: int


@dataclass(frozen=True)
class StepOutput:
    """The result of LLMEngine.step.

    finished: the requests from add_request that have finished, in order of arrival.
    num_prefill_tokens, num_decode_tokens: tokens that the step computed; one of the two is 0.
    """

    finished: tuple[RequestOutput, ...]
    num_prefill_tokens: int
    num_decode_tokens: int
