"""Whether a kernel, or the host side, became slower than in a stored run, decided from many samples of both.

    a kernel: the whole confidence interval of median(now) / median(before) lies above 1 + PRACTICAL_THRESHOLD

The interval is a percentile bootstrap (Efron 1979): both runs' samples are drawn anew, with replacement, RESAMPLES
times. Its level is shared among the benchmarks that are compared (Bonferroni), so that the more there are, the less
one of them fails by chance. Samples are taken in turns with the peers', so that what drifts in a session widens the
interval. Two sessions on one GPU differ without any change of code (clocks, temperature, memory layout), which the
interval of one session does not show: the practical threshold allows for that.

    the host side: the ratio to a fixed workload of plain Python grew by more than SLOWER, measured RETRIES times more

On a shared machine times of the host scatter by a factor of two, and those ratios do not (benchmarks/hosting.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.hosting import RETRIES, SLOWER

PRACTICAL_THRESHOLD = 0.05
CONFIDENCE = 0.99  # the probability that no benchmark of a session fails by chance
RESAMPLES = 4000
MIN_SAMPLES = 8  # fewer do not give meaningful quantiles


class Decision(NamedTuple):
    """ratio: median now over median before, between low and high."""

    name: str
    ratio: float
    low: float
    high: float
    is_slower: bool
    is_faster: bool


def check_same_device(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise ValueError unless both runs' machine_info name the same GPU (or both none)."""
    if now.get("gpu") != before.get("gpu"):
        raise ValueError(
            f"both runs must be of the same GPU, got {now.get('gpu') or 'no GPU'} now and "
            f"{before.get('gpu') or 'no GPU'} in the stored run; name another with --benchmark-compare=NUMBER, "
            "or store one here with --benchmark-autosave"
        )


def decide(
    name: str,
    before: Sequence[float],
    now: Sequence[float],
    *,
    num_comparisons: int = 1,
    threshold: float = PRACTICAL_THRESHOLD,
) -> Decision:
    """The decision for one benchmark, from seconds a call. The same samples give the same decision."""
    for what, samples in (("stored", before), ("new", now)):
        if len(samples) < MIN_SAMPLES:
            raise ValueError(
                f"{name}: a decision takes at least {MIN_SAMPLES} samples, got {len(samples)} {what} ones; "
                "store runs with --benchmark-autosave, which keeps them"
            )
    rng = np.random.default_rng(0)
    ratios = _medians(rng, now) / _medians(rng, before)
    tail = (1 - CONFIDENCE) / num_comparisons / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    ratio = float(np.median(now) / np.median(before))
    is_slower, is_faster = bool(low > 1 + threshold), bool(high < 1 - threshold)
    return Decision(name, ratio, float(low), float(high), is_slower, is_faster)


def decide_all(before: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]]) -> list[Decision]:
    """One decision for each kernel's benchmark that both runs hold, from the seconds of its calls."""
    common = [name for name in now if name in before]
    return [decide(name, before[name], now[name], num_comparisons=len(common)) for name in common]


def decide_host(name: str, before: float, now: Sequence[float]) -> Decision:
    """The decision for a benchmark of the host. before, now: ratios to the yardstick; now: one for each measurement."""
    growth = sorted(ratio / before for ratio in now)
    is_slower = len(now) > RETRIES and growth[0] > SLOWER
    return Decision(name, growth[0], growth[0], growth[-1], is_slower, growth[-1] < 1 / SLOWER)


def _medians(rng: np.random.Generator, samples: Sequence[float]) -> np.ndarray:
    array = np.asarray(samples)
    return np.median(array[rng.integers(0, len(array), (RESAMPLES, len(array)))], axis=1)


def summary(decisions: Sequence[Decision]) -> str:
    """What changed, slowest first, and the rule that decided it."""
    lines = []
    for decision in sorted(decisions, key=lambda decision: -decision.ratio):
        if decision.is_slower or decision.is_faster:
            word = "SLOWER" if decision.is_slower else "faster"
            interval = f"{decision.low - 1:+.1%} to {decision.high - 1:+.1%}"
            lines.append(f"{word} {decision.ratio - 1:+.1%} ({interval})  {decision.name}")
    num_slower = sum(decision.is_slower for decision in decisions)
    lines.append(
        f"{len(decisions)} benchmarks compared, {num_slower} of them SLOWER. A kernel: the whole confidence interval "
        f"of the ratio of medians ({CONFIDENCE:.0%} for all together) lies above +{PRACTICAL_THRESHOLD:.0%}. The host "
        f"side: {1 + RETRIES} times more than {SLOWER} times as long as before, as a ratio to plain Python"
    )
    return "\n".join(lines)
