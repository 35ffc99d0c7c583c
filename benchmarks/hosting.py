"""One benchmark of the host side: timed in turns with a fixed workload of plain Python, and compared as a ratio to it.

A machine that is slower, or busy, slows both: the ratio of a round to the workload's time just before it stays. So two
runs are compared by the median of these ratios, also on different machines. A benchmark that seems slower than in the
stored run is measured again in the same session, RETRIES times; it became slower if it is so every time.

A run of many milliseconds gets as many yardsticks before it as take about as long: a single one would often end before
another process is given the core, which slows the run alone.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

ROUNDS = 200
WARMUP_ROUNDS = 5
RETRIES = 2
SLOWER = 1.5  # a ratio that grew by this factor fails; one that doubled does so for certain


def yardstick() -> int:
    """A fixed workload like the host side's: integers, a list, a dictionary. It takes about 0.1 ms."""
    total, table, numbers = 0, {}, []
    for number in range(700):
        total += number * number % 7
        table[number % 61] = total
        numbers.append(table.get(number % 17, 0))
    return total + len(numbers)


def seconds_of(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def seconds_per_yardstick(number: int) -> float:
    return seconds_of(lambda: [yardstick() for _ in range(number)]) / number


class HostMeasurement:
    """What the fixture `host` gives: call it once in a test. stored_ratio: of the run that is compared with, if any."""

    def __init__(self, benchmark: Any, stored_ratio: float | None) -> None:
        self._benchmark = benchmark
        self._stored_ratio = stored_ratio

    def __call__(
        self,
        run: Callable[..., Any],
        prepare: Callable[[], Any] | None = None,
        teardown: Callable[..., Any] | None = None,
        rounds: int = ROUNDS,
        yardsticks_per_round: int = 1,
    ) -> Any:
        """The result of the last run(prepare()), or run() without it; prepare and teardown(prepare()) are not timed.

        rounds, yardsticks_per_round: fewer and more for a run of many milliseconds.
        """
        yardsticks: list[float] = []
        warmup_rounds = min(WARMUP_ROUNDS, rounds // 4)

        def setup() -> Any:
            arguments = () if prepare is None else (prepare(),)
            yardsticks.append(seconds_per_yardstick(yardsticks_per_round))
            return arguments, {}

        result = self._benchmark.pedantic(
            run, setup=setup, teardown=teardown, rounds=rounds, warmup_rounds=warmup_rounds
        )
        if self._benchmark.disabled:
            return result
        ratios = [median(map(_divide, self._benchmark.stats.stats.data, yardsticks[warmup_rounds:]))]
        while self._stored_ratio and len(ratios) <= RETRIES and ratios[-1] > SLOWER * self._stored_ratio:
            ratios.append(ratio_to_yardstick(run, prepare, teardown, rounds, yardsticks_per_round))
        self._benchmark.extra_info.update(
            host=self._benchmark.name.removeprefix("test_"),
            microseconds=self._benchmark.stats.stats.median * 1e6,
            yardstick_microseconds=median(yardsticks) * 1e6,
            ratios=ratios,
        )
        return result


def ratio_to_yardstick(
    run: Callable[..., Any],
    prepare: Callable[[], Any] | None,
    teardown: Callable[..., Any] | None,
    rounds: int,
    yardsticks_per_round: int,
) -> float:
    """Median over the rounds of the time of a run, divided by the yardstick's time just before it."""
    ratios = []
    for _ in range(rounds):
        arguments = () if prepare is None else (prepare(),)
        unit = seconds_per_yardstick(yardsticks_per_round)
        ratios.append(seconds_of(lambda: run(*arguments)) / unit)  # noqa: B023 (called at once)
        if teardown is not None:
            teardown(*arguments)
    return median(ratios)


def _divide(seconds: float, unit: float) -> float:
    return seconds / unit
