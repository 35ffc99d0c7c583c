"""tests.support.statistics against sums over every outcome, and what it says when draws are wrong."""

import math

import pytest

from tests.support import statistics
from tests.support.statistics import TemperatureFamily, check_counts, smallest_dropped_mass

PROBS = (0.6, 0.3, 0.1)


@pytest.mark.parametrize("prob", [1e-3, 0.2, 0.5, 0.93])
def test_the_bound_of_a_count_holds_for_every_count(prob: float) -> None:
    """Against exact binomial tails: never above the bound, and not below 1 / (n + 1) of it, or nothing would fail."""
    n = 40
    mass = [math.comb(n, k) * prob**k * (1 - prob) ** (n - k) for k in range(n + 1)]
    for k in range(n + 1):
        tail = math.fsum(mass[k:]) if k >= n * prob else math.fsum(mass[: k + 1])
        bound = math.exp(-n * statistics.divergence(k / n, prob))
        assert bound / (n + 1) <= tail * (1 + 1e-12) <= bound * (1 + 1e-9)


def outcomes(num_draws: int) -> list[tuple[int, ...]]:
    """The counts of every sequence of draws of three tokens, up to order."""
    return [(a, b, num_draws - a - b) for a in range(num_draws + 1) for b in range(num_draws + 1 - a)]


def probability(counts: tuple[int, ...], probs: tuple[float, ...]) -> float:
    ways = math.factorial(sum(counts)) / math.prod(map(math.factorial, counts))
    return ways * math.prod(prob**count for prob, count in zip(probs, counts, strict=True))


def evidence(family: TemperatureFamily, counts: tuple[int, ...]) -> float:
    mean = sum(count * z for count, z in zip(counts, family.z, strict=True)) / sum(counts)
    return sum(counts) * family.divergence(family.tilt_of_mean(mean), 0.0)


@pytest.mark.parametrize("level", [1.0, 2.0, 3.0])
def test_a_temperature_is_refused_as_seldom_as_said_and_missed_as_seldom_as_said(level: float) -> None:
    """Every outcome of 30 draws, each with its exact probability."""
    n, family = 30, TemperatureFamily(PROBS)
    refused = [counts for counts in outcomes(n) if evidence(family, counts) > level]
    assert 0 < math.fsum(probability(counts, PROBS) for counts in refused) <= 2 * math.exp(-level)
    for error in (-0.4, 0.8):
        weights = [prob ** (1 / (1 + error)) for prob in PROBS]
        wrong = tuple(weight / sum(weights) for weight in weights)
        missed = 1 - math.fsum(probability(counts, wrong) for counts in refused)
        assert missed <= statistics.miss_probability(PROBS, n, error, level) * (1 + 1e-9)


def test_what_cannot_happen_is_refused_when_it_does() -> None:
    check_counts([0, 10], 10, [0.0, 1.0], "sure")
    with pytest.raises(AssertionError, match="sure: 1 of 10 draws are in cell 0 of probability 0"):
        check_counts([1, 9], 10, [0.0, 1.0], "sure")


def test_a_mass_just_large_enough_is_noticed_when_it_is_never_drawn() -> None:
    mass = smallest_dropped_mass(10_000)
    check_counts([0], 10_000, [0.999 * mass], "a little less")
    with pytest.raises(AssertionError, match=r"0 of 10000 .*NANOVLLM_TEST_SEED="):
        check_counts([0], 10_000, [1.001 * mass], "a little more")


def test_comparisons_beyond_the_stated_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_num_comparisons", statistics.MAX_COMPARISONS - 1)
    check_counts([5], 10, [0.5], "the last")
    with pytest.raises(AssertionError, match="more comparisons than the rate of false alarms allows"):
        check_counts([5], 10, [0.5], "one too many")


def test_the_rates_of_a_run_add_up_to_less_than_one_in_a_thousand_million() -> None:
    assert 2 * math.exp(-statistics.THRESHOLD) * statistics.MAX_COMPARISONS + 5 * statistics.MISSES <= 1.0001e-9
