"""SamplingParams: how the tokens of a request are sampled, and when the request ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.validation import (
    as_ints,
    convert_numpy_integers,
    reject_unknown_options,
    require_bool,
    require_int,
    require_number,
)

MIN_TEMPERATURE = 1e-10
MAX_TEMPERATURE = 3.4e38  # larger values are infinite in float32, in which the sampler computes
MAX_TOP_K = 2**31 - 1  # larger than any vocabulary, and in the range of int32


@reject_unknown_options
@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request. Frozen and validated: ValueError for a wrong value, TypeError for an unknown name.

    temperature: logits are divided by it; above 1e-10, at most 3.4e38. For argmax use SamplingParams.greedy().
    max_tokens: the largest number of tokens to generate, at least 1.
    ignore_eos: whether to continue after the model's end-of-sequence token; stop and stop_token_ids still apply.
    top_k: sample from the k most likely tokens only; None is no limit; 1 is argmax.
    top_p: sample from the smallest set of most likely tokens whose probability reaches top_p, in (0, 1].
    min_p: leave out tokens whose probability is below min_p times that of the most likely one, in [0, 1].
    seed: 0 .. 2**64-1. Equal seed, prompt and parameters give equal tokens, whatever other requests run (except
        where rounding of the logits changes a draw). None derives a seed from the engine's and the request's number.
    stop: a string or strings; the text ends before the first one that appears. The text has no special tokens, but
        a stop string that contains the whole text of a special token ("<|im_end|>") is found where that token is. Part
        of a special token's text ("im_end") does not match it. The token that completes a stop string is the last of
        token_ids.
    stop_token_ids: token ids that end the request like the end-of-sequence token, whatever ignore_eos is.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        require_number(
            "temperature",
            self.temperature,
            f"a finite number above {MIN_TEMPERATURE}",
            lambda value: value > MIN_TEMPERATURE,
            remedy="use SamplingParams.greedy() for the most likely token at every step",
        )
        require_number(
            "temperature",
            self.temperature,
            f"a number of at most {MAX_TEMPERATURE}, the range of float32",
            lambda value: value <= MAX_TEMPERATURE,
            remedy="lower it",
        )
        require_int("max_tokens", self.max_tokens, 1)
        require_bool("ignore_eos", self.ignore_eos)
        if self.top_k is not None:
            require_int("top_k", self.top_k, 1, MAX_TOP_K, remedy="use None for no limit")
        no_limit = "use {} for no limit"
        require_number("top_p", self.top_p, "a number in (0, 1]", lambda value: 0 < value <= 1, no_limit.format(1.0))
        require_number("min_p", self.min_p, "a number in [0, 1]", lambda value: 0 <= value <= 1, no_limit.format(0.0))
        if self.seed is not None:
            require_int("seed", self.seed, 0, 2**64 - 1, remedy="use None to derive it from the engine's seed")
        object.__setattr__(self, "stop", _as_stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_token_ids(self.stop_token_ids))
        convert_numpy_integers(self)

    @classmethod
    def greedy(cls, **options: Any) -> "SamplingParams":
        """Parameters for the most likely token at every step: top_k=1, exact argmax, lowest token id on a tie."""
        return cls(top_k=1, **options)

    @property
    def is_greedy(self) -> bool:
        return self.top_k == 1


def _as_stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _as_tuple(stop)
    if strings is None or not all(isinstance(item, str) and item for item in strings):
        raise ValueError(f"stop must be a non-empty string or a list of them, got {stop!r}")
    return strings


def _as_token_ids(token_ids: Any) -> tuple[int, ...]:
    items = _as_tuple(token_ids)
    plain = None if items is None else as_ints(items)
    if plain is None or any(item < 0 for item in plain):
        raise ValueError(f"stop_token_ids must be a list of token ids (integers of at least 0), got {token_ids!r}")
    return tuple(plain)


def _as_tuple(value: Any) -> tuple[Any, ...] | None:
    """The items of `value`, () for None; None if it is a str or cannot be iterated."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else None
