"""Checks of random draws with proven error rates: no normal approximation, no table of critical values.

Chernoff's bound: of n independent draws, each an event of probability p, a fraction f >= p (or f <= p) are events with
probability at most exp(-n * KL(f || p)), whatever n and p. So n * KL, in nats, is the evidence against p, and a
comparison fails when it exceeds THRESHOLD: both sides together happen with probability 2 * exp(-THRESHOLD) at most. The
same bound holds for the mean of any function of a draw; for the logits' mean it gives the sharpest possible test of the
temperature, since p_T(v) ~ exp(logit[v] / T) is an exponential family with that mean as its statistic.

A run of the suite makes at most MAX_COMPARISONS such comparisons (counted, and enforced), so a correct sampler fails a
run with probability FALSE_ALARMS at most. A test that plants an error misses it with probability MISSES at most.
So a run fails without an error in the code less than once in 1e9 choices of NANOVLLM_TEST_SEED, which decides all
draws.
"""

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from tests.support.counts import count_comparisons

FALSE_ALARMS = 5e-10  # per run of the suite
MAX_COMPARISONS = 20_000  # per run of the suite
THRESHOLD = math.log(2 * MAX_COMPARISONS / FALSE_ALARMS)  # 32 nats
MISSES = 1e-10  # of a planted error of the size that a test says it detects; fewer than five tests depend on it

SEED = os.environ.get("NANOVLLM_TEST_SEED", "0")

_num_comparisons = 0


def fresh_seed(purpose: str) -> int:
    """A 64-bit seed that NANOVLLM_TEST_SEED and the purpose decide, unrelated to that of any other purpose."""
    return xxhash.xxh64_intdigest(f"{SEED}/{purpose}".encode())


def check_counts(counts: Sequence[int], num_draws: int, probs: Sequence[float], what: str) -> None:
    """Raise AssertionError unless each counts[i] is one that num_draws draws of probability probs[i] can give. It names
    the cell with the most evidence against it.
    """
    _count_comparisons(len(probs))
    cells = list(zip(counts, probs, strict=True))
    evidence = [num_draws * divergence(count / num_draws, prob) for count, prob in cells]
    worst = max(range(len(cells)), key=evidence.__getitem__)
    count, prob = cells[worst]
    assert evidence[worst] <= THRESHOLD, (
        f"{what}: {count} of {num_draws} draws are in cell {worst} of probability {prob:.6g}, which expects "
        f"{num_draws * prob:.1f}: {evidence[worst]:.1f} nats of evidence against it, {THRESHOLD:.1f} allowed "
        f"(NANOVLLM_TEST_SEED={SEED})"
    )


def check_temperature(counts: Sequence[int], probs: Sequence[float], what: str) -> None:
    """Raise AssertionError unless the draws' mean log-probability is one that the temperature of `probs` can give.

    probs: of the tokens that can be drawn, all positive.
    """
    _count_comparisons(1)
    num_draws, family = sum(counts), TemperatureFamily(probs)
    mean = sum(count * z for count, z in zip(counts, family.z, strict=True)) / num_draws
    tilt = family.tilt_of_mean(mean)
    evidence = num_draws * family.divergence(tilt, 0.0)
    assert evidence <= THRESHOLD, (
        f"{what}: {num_draws} draws look like a temperature {100 / (1 + tilt) - 100:+.3f} % off: {evidence:.1f} nats "
        f"of evidence against it, {THRESHOLD:.1f} allowed (NANOVLLM_TEST_SEED={SEED})"
    )


def check_differences(a: np.ndarray, b: np.ndarray, num_values: int, what: str) -> None:
    """Raise AssertionError unless each difference of a and b, uniform on 0 .. num_values - 1, comes equally often."""
    counts = np.bincount((a - b) % num_values, minlength=num_values)
    check_counts(counts.tolist(), len(a), [1 / num_values] * num_values, what)


def _count_comparisons(number: int) -> None:
    global _num_comparisons
    _num_comparisons += number
    count_comparisons("sampler statistics against exact probabilities", number)
    assert _num_comparisons <= MAX_COMPARISONS, "more comparisons than the rate of false alarms allows: raise its share"


# --- what is detected ---


def smallest_dropped_mass(num_draws: int) -> float:
    """A set of tokens of this probability or more that is never drawn is noticed for certain: no count is 0 then."""
    return -math.expm1(-THRESHOLD / num_draws)


def miss_probability(probs: Sequence[float], num_draws: int, error: float, threshold: float = THRESHOLD) -> float:
    """A bound on the probability that check_temperature passes draws at a temperature 1 + error times the right one.

    Chernoff's bound, from the other side: the draws' mean must then come at least as near to the right one
    as the mean at which check_temperature begins to pass.
    """
    family, wrong = TemperatureFamily(probs), 1 / (1 + error) - 1
    if num_draws * family.divergence(wrong, 0.0) <= threshold:
        return 1.0
    passes = last_that_holds(lambda tilt: num_draws * family.divergence(tilt, 0.0) <= threshold, 0.0, wrong)
    return math.exp(-num_draws * family.divergence(passes, wrong))


# --- the arithmetic ---


def last_that_holds(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Bisection for the number, between one for which `holds` and one for which it does not, up to which it does."""
    for _ in range(200):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def divergence(f: float, p: float) -> float:
    """KL(f || p) of two coins, in nats."""
    terms = ((f, p), (1 - f, 1 - p))
    return sum(a * (math.log(a / b) if b else math.inf) for a, b in terms if a)


class TemperatureFamily:
    """p_t(v) = p(v) * exp(t * z[v]) / sum, z = log p: the distribution at temperature 1 / (1 + t) of the right one."""

    def __init__(self, probs: Sequence[float]) -> None:
        self.z = [math.log(prob) for prob in probs]

    def mean(self, tilt: float) -> float:
        """Of z."""
        weights = [math.exp((1 + tilt) * z) for z in self.z]
        return math.fsum(w * z for w, z in zip(weights, self.z, strict=True)) / math.fsum(weights)

    def divergence(self, tilt: float, other: float) -> float:
        """KL(p_tilt || p_other) in nats."""
        return (tilt - other) * self.mean(tilt) - self._log_sum(tilt) + self._log_sum(other)

    def tilt_of_mean(self, mean: float) -> float:
        """The tilt at which z has this mean: the likeliest one for draws that have it. Within -20 and 20."""
        return last_that_holds(lambda tilt: self.mean(tilt) < mean, -20.0, 20.0)

    def _log_sum(self, tilt: float) -> float:
        return math.log(math.fsum(math.exp((1 + tilt) * z) for z in self.z))
