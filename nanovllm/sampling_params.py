"""SamplingParams: how the tokens of one request are chosen and when the request ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.validation import (
    convert_numpy_integers,
    is_int,
    reject_unknown_options,
    require_bool,
    require_int,
    require_number,
)

MIN_TEMPERATURE = 1e-10
MAX_TEMPERATURE = 3.4e38  # a larger one is infinite in float32, in which the sampler computes
MAX_TOP_K = 2**31 - 1  # beyond any vocabulary, and within the arrays of a step


@reject_unknown_options
@dataclass(frozen=True)
class SamplingParams:
    """Frozen and validated; every violation is a ValueError, an unknown name a TypeError.

    temperature: logits are divided by it; above 1e-10, at most 3.4e38. For argmax use SamplingParams.greedy().
    max_tokens: at most this many tokens are generated (at least 1).
    ignore_eos: True goes on after the model's end-of-sequence token (stop and stop_token_ids still end the request).
    top_k: sample from the k most likely tokens only; None is no limit; 1 is argmax.
    top_p: sample from the smallest set of most likely tokens whose probability reaches top_p, in (0, 1].
    min_p: drop tokens whose probability is below min_p times that of the most likely one, in [0, 1].
    seed: 0 .. 2**64-1; the same seed, prompt and parameters give the same tokens whatever else runs beside them.
        None takes one derived from the engine's seed and the request's arrival number.
    stop: a string or strings; the text ends before the first that appears. The text leaves special tokens out, but a
        stop string that contains the whole text of a special token ("<|im_end|>") is looked for with that token written
        out. A part of a special token's text ("im_end") does not match it. The token that completes a stop string is
        the last of token_ids.
    stop_token_ids: token ids that end the request like the end-of-sequence token, ignore_eos or not.
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
            f"a number above {MIN_TEMPERATURE}",
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
        """The most likely token at every step: top_k=1, exact argmax, lowest token id on a tie."""
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
    if items is None or not all(is_int(item) and item >= 0 for item in items):
        raise ValueError(f"stop_token_ids must be a list of token ids (integers of at least 0), got {token_ids!r}")
    return tuple(int(item) for item in items)


def _as_tuple(value: Any) -> tuple[Any, ...] | None:
    """None (nothing given) is empty; what cannot be iterated, or is a str, is no list: None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else None
