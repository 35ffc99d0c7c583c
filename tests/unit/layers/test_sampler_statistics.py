"""The sampler's draws by the million: right ones pass but once in 1e9 runs, planted errors are caught.

tests.support.statistics says from what the thresholds are derived, and how a failure names its seed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.sampler import Sampler
from nanovllm.sampling_metadata import SamplingMetadata
from tests.support.sampler_draws import Case, Draw, one_against
from tests.support.statistics import MISSES, THRESHOLD, check_counts, miss_probability, smallest_dropped_mass

TEMPERATURE_ERROR = 0.005  # detected in every case of SHARP
DROPPED_MASS = 1e-5  # detected in every case of SHARP, for certain

ZIPF = tuple(1 / rank for rank in range(1, 18))
SHARP = [  # 0.2 s a million draws
    Case("13 tokens", one_against(12, 0.77), 3_800_000, temperature=0.7),
    Case("16 tokens, of which two are rare", one_against(13, 0.76, 5e-6, 5e-6), 3_600_000, "many requests"),
    Case("17 tokens, bfloat16", one_against(16, 0.75), 3_300_000, "a batch", temperature=3.0, dtype=torch.bfloat16),
    Case("14 of 17 tokens", (*one_against(13, 0.77), *[1e-4] * 3), 3_600_000, "a batch", top_k=14, min_p=1e-3),
]
OTHERS = [
    Case("two tokens", (0.5, 0.5), 500_000),
    Case("five equal tokens, float16", (1.0,) * 5, 500_000, "many requests", 0.1, dtype=torch.float16),
    Case("a slope of 97 tokens", tuple(0.9**rank for rank in range(97)), 300_000, "a batch"),
    Case("top_k among ties", (3.0, 1.0, 2.0, 2.0, 0.5, 2.0, 1.0), 500_000, "a batch", top_k=3),
    Case("top_p", ZIPF, 500_000, "one request", 1.5, top_p=0.8),
    Case("min_p", ZIPF, 500_000, "many requests", 0.8, min_p=0.09),
    Case("top_k, top_p and min_p", ZIPF, 500_000, "a batch", 0.6, top_k=12, top_p=0.95, min_p=0.12),
]  # fmt: skip


@pytest.mark.parametrize("case", [*SHARP, *OTHERS], ids=str)
def test_draws_follow_the_filtered_softmax(case: Case) -> None:
    """D56, D57, D58."""
    case.check(case.draw())


@pytest.mark.parametrize("case", SHARP, ids=str)
def test_the_cases_are_sharp_enough_for_what_is_claimed(case: Case) -> None:
    probs = [prob for prob in case.probs if prob > 0]
    for error in (-TEMPERATURE_ERROR, TEMPERATURE_ERROR):
        assert miss_probability(probs, case.num_draws, error) <= MISSES
    assert smallest_dropped_mass(case.num_draws) <= DROPPED_MASS


# --- planted errors ---


def with_rows(change: Callable[[SamplingMetadata], SamplingMetadata]) -> Draw:
    return lambda logits, rows: Sampler()(logits, change(rows))


@pytest.mark.parametrize(("case", "sign"), list(zip(SHARP, (1, -1, 1, -1), strict=True)), ids=str)
def test_a_temperature_half_a_percent_off_is_caught(case: Case, sign: int) -> None:
    """Missed with probability MISSES at most."""
    error = sign * TEMPERATURE_ERROR
    wrong = with_rows(lambda rows: replace(rows, temperature=rows.temperature * (1 + error)))
    with pytest.raises(AssertionError, match="look like a temperature"):
        case.check_temperature(case.draw(wrong))


def test_a_tail_that_is_never_drawn_is_caught() -> None:
    """Both rare tokens, 1e-5 together. Either alone is expected 18 times, too few to say that 0 is wrong."""
    case = SHARP[1]

    def without_tail(logits: torch.Tensor, rows: SamplingMetadata) -> torch.Tensor:
        logits = logits.clone()
        logits[:, -2:] = -torch.inf
        return Sampler()(logits, rows)

    with pytest.raises(AssertionError, match="all rare ones: 0 of"):
        case.check(case.draw(without_tail))


def test_noise_of_too_few_bits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """D56: 12 random bits of 32 give what should come once in 200,000 draws fifty times as often."""
    exponential_from_words = sampler_module.exponential_from_words
    monkeypatch.setattr(sampler_module, "exponential_from_words", lambda w: exponential_from_words(w >> 20 << 20))
    with pytest.raises(AssertionError, match="of probability 5e-06"):
        SHARP[1].check(SHARP[1].draw())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [({"top_k": 12}, {"top_k": 11}), ({"top_p": 0.95}, {"top_p": 0.9}), ({"min_p": 0.12}, {"min_p": 0.13})],
    ids=str,
)
def test_a_filter_that_is_a_little_off_is_caught(right: dict[str, Any], wrong: dict[str, Any]) -> None:
    """The wrong one keeps one token less, the least probable of those that are right."""
    case = Case(str(right), ZIPF, 100_000, **right)
    with pytest.raises(AssertionError, match="in cell"):
        case.check(replace(case, **wrong).draw())


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHARP, ids=str)
def test_draws_on_a_gpu_follow_the_softmax(case: Case) -> None:
    """The Triton kernel's, and 25 times as many: five times as sharp."""
    case = replace(case, num_draws=25 * case.num_draws)
    assert miss_probability([prob for prob in case.probs if prob > 0], case.num_draws, TEMPERATURE_ERROR / 5) <= MISSES
    case.check(case.draw(device="cuda"))


@pytest.mark.gpu
def test_tokens_beyond_the_reach_of_24_bits_are_drawn_on_a_gpu() -> None:
    """D56: 4095 tokens of 2**-26 each, 6.1e-5 together; float32's uniform numbers, multiples of 2**-24, miss them."""
    case = Case("far tail", (1 - 4095 * 2.0**-26, *[2.0**-26] * 4095), 2_000_000)
    counts, probs = case.draw(device="cuda"), case.probs
    check_counts([sum(counts[1:])], case.num_draws, [sum(probs[1:])], case.name)
    assert case.num_draws * sum(probs[1:]) > THRESHOLD, "none at all would be noticed"
