"""Laws of the sampler's draws: they follow the filtered softmax, and are independent over positions, seeds and tokens.

A correct sampler fails less than one run in 1e9, and each law has planted errors that it catches.
tests.support.statistics says from what the thresholds are derived, and how a failure names its seed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.philox import token_words
from nanovllm.layers.sampler import Sampler
from tests.support.sampler_draws import Case, Draw, make_rows, one_against, rows_on_device
from tests.support.statistics import (
    MISSES,
    check_differences,
    fresh_seed,
    miss_probability,
    smallest_dropped_mass,
)

TEMPERATURE_ERROR = 0.005  # detected in every case of SHARP
DROPPED_MASS = 1e-5  # detected in every case of SHARP, for certain

ZIPF = tuple(1 / rank for rank in range(1, 18))
SHARP = [  # 0.2 s a million draws
    Case("13 tokens", one_against(12, 0.77), 3_800_000, temperature=0.7),
    Case("16 tokens, of which two are rare", one_against(13, 0.76, 5e-6, 5e-6), 3_600_000, "many requests"),
    Case("17 tokens, bfloat16", one_against(16, 0.75), 3_300_000, "a batch", temperature=3.0, dtype=torch.bfloat16),
]
OTHERS = [
    Case("a slope of 97 tokens, float16", tuple(0.9**rank for rank in range(97)), 300_000, dtype=torch.float16),
    Case("top_k among ties", (3.0, 1.0, 2.0, 2.0, 0.5, 2.0, 1.0), 500_000, "a batch", top_k=3),
    Case("top_p", ZIPF, 500_000, "one request", 1.5, top_p=0.8),
    Case("min_p", ZIPF, 500_000, "many requests", 0.8, min_p=0.09),
    Case("top_k, top_p and min_p", ZIPF, 500_000, "a batch", 0.6, top_k=12, top_p=0.95, min_p=0.12),
]


def changed(change: Callable[[Any], dict[str, torch.Tensor]]) -> Draw:
    """A sampler whose rows are wrong in some fields."""
    return lambda logits, rows: Sampler()(logits, replace(rows, **change(rows)))


# --- the distribution ---


@pytest.mark.parametrize("case", [*SHARP, *OTHERS], ids=str)
def test_draws_follow_the_filtered_softmax(case: Case) -> None:
    """D56, D57, D58."""
    case.check(case.draw())


def test_the_cases_are_sharp_enough_for_what_is_claimed() -> None:
    for case in SHARP:
        probs = [prob for prob in case.probs if prob > 0]
        for error in (-TEMPERATURE_ERROR, TEMPERATURE_ERROR):
            assert miss_probability(probs, case.num_draws, error) <= MISSES
        assert smallest_dropped_mass(case.num_draws) <= DROPPED_MASS


def without_tail(logits: torch.Tensor, rows: Any) -> torch.Tensor:
    logits = logits.clone()
    logits[:, -2:] = -torch.inf
    return Sampler()(logits, rows)


@pytest.mark.parametrize(
    ("case", "message", "wrong"),
    [
        # Missed with probability MISSES at most.
        (SHARP[0], "a temperature", changed(lambda rows: {"temperature": rows.temperature * (1 + TEMPERATURE_ERROR)})),
        # Both rare tokens, 1e-5 together. Either alone is expected 18 times, too few to say that 0 is wrong.
        (SHARP[1], "all rare ones: 0 of", without_tail),
        # One token less, the least probable of those that are right.
        (Case("p", ZIPF, 100_000, top_p=0.95), "in cell", changed(lambda rows: {"top_p": rows.top_p - 0.05})),
    ],
    ids=["temperature", "tail", "filter"],
)
def test_wrong_draws_are_caught(case: Case, message: str, wrong: Draw) -> None:
    counts = case.draw(wrong)
    with pytest.raises(AssertionError, match=message):
        (case.check_temperature if "temperature" in message else case.check)(counts)


def test_noise_of_too_few_bits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """D56: 12 random bits of 32 give what should come once in 200,000 draws fifty times as often."""
    exponential_from_words = sampler_module.exponential_from_words
    monkeypatch.setattr(sampler_module, "exponential_from_words", lambda w: exponential_from_words(w >> 20 << 20))
    case = replace(SHARP[1], num_draws=300_000)
    with pytest.raises(AssertionError, match="of probability 5e-06"):
        case.check(case.draw())


# --- independence: of tokens that are all alike, differences modulo their number are uniform ---

VOCAB_SIZE = 4
LAGS = (1, 2, 3, 4, 5, 8, 64, 1024)


def draws(sampler: Draw, seeds: np.ndarray | int, positions: np.ndarray | int, num_draws: int) -> np.ndarray:
    rows = rows_on_device(make_rows(num_draws, seed=seeds, position=positions), "cpu")
    return sampler(torch.zeros(1, VOCAB_SIZE).expand(num_draws, -1), rows).numpy()


def check_lags(sampler: Draw) -> None:
    """Over the positions of a request, over the seeds of a batch, and over both at once."""
    num_draws, seed = 150_000, fresh_seed("lags")
    number = np.arange(num_draws)
    seeds = number.astype(np.uint64) + np.uint64(seed)
    axes = {"positions": (seed, number), "seeds": (seeds, 7), "rows": (seeds[::-1].copy(), number)}
    for axis, (seed_of_row, position_of_row) in axes.items():
        tokens = draws(sampler, seed_of_row, position_of_row, num_draws)
        for lag in LAGS:
            check_differences(tokens[lag:], tokens[:-lag], VOCAB_SIZE, f"{axis}, lag {lag}")


def check_token_ids(words: Callable[..., torch.Tensor]) -> None:
    """Tokens of one row, at every lag: the first 4 bits of their words."""
    row = torch.arange(16)
    table = words(row * 12345, row, row, 20_001).numpy() >> 28
    for lag in LAGS:
        check_differences(table[:, lag:].ravel(), table[:, :-lag].ravel(), 16, f"token ids, lag {lag}")


@pytest.mark.parametrize(("check", "right"), [(check_lags, Sampler()), (check_token_ids, token_words)])
def test_draws_are_independent(check: Callable[[Any], None], right: Any) -> None:
    """D57, D58."""
    check(right)


@pytest.mark.parametrize(
    ("check", "message", "wrong"),
    [
        (check_lags, "positions, lag", changed(lambda rows: {"position": rows.position % 64})),
        (check_lags, "seeds, lag", changed(lambda rows: {"seed_low": rows.seed_low // 2})),
        (
            check_lags,
            "rows, lag",
            changed(lambda rows: {"seed_low": rows.seed_low + rows.position, "position": rows.top_k}),
        ),
        (check_token_ids, "token ids, lag", lambda *row: token_words(*row[:3], 4).repeat(1, 5001)[:, : row[3]]),
    ],
)
def test_draws_that_depend_on_each_other_are_caught(check: Any, message: str, wrong: Any) -> None:
    """D57, D58: counters that lose a part of (seed, position, token), or mix two of them."""
    with pytest.raises(AssertionError, match=message):
        check(wrong)
