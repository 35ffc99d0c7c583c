"""Decides whether a new token ends its request, and why. All other code reads Sequence.finish_cause."""

from collections.abc import Callable

from nanovllm.engine.sequence import FinishCause, Sequence


def finish_cause(
    seq: Sequence,
    *,
    eos_token_ids: frozenset[int],
    max_model_len: int,
    completes_stop_string: Callable[[Sequence], bool],
) -> FinishCause | None:
    """Why the last token of `seq` ends the request; None if the request goes on.

    Where several causes apply, the first in the order of FinishCause is returned. FinishCause.ABORT is not among them:
    an aborted sequence is finished and gets no further token.
    completes_stop_string: called only for a request with stop strings, and not for a token that ends it otherwise.
    """
    params, token_id = seq.sampling_params, seq.last_token
    if not params.ignore_eos and token_id in eos_token_ids:
        return FinishCause.EOS_TOKEN
    if token_id in params.stop_token_ids:
        return FinishCause.STOP_TOKEN
    if params.stop and completes_stop_string(seq):
        return FinishCause.STOP_STRING
    return FinishCause.LENGTH if has_full_length(seq, seq.num_tokens, max_model_len) else None


def has_full_length(seq: Sequence, num_tokens: int, max_model_len: int) -> bool:
    """Whether `seq` ends once it has num_tokens tokens, whatever they are."""
    return num_tokens - seq.num_prompt_tokens >= seq.sampling_params.max_tokens or num_tokens >= max_model_len
