"""One benchmark of the host side: timed in turns with a fixed workload of plain Python, and counted in its times.

A machine that is slower, or busy, slows both: the ratio of a round to the workload's time just before it stays. So two
runs are compared by the median of these ratios, also on different machines.

A run of many milliseconds gets as many yardsticks before it as take about as long: a single one would often end before
another process is given the core, which slows the run alone.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

ROUNDS = 200
WARMUP_ROUNDS = 5


def yardstick() -> int:
    """A fixed workload like the host side's: integers, a list, a dictionary. It takes about 0.1 ms."""
    total, table, numbers = 0, {}, []
    for number in range(700):
        total += number * number % 7
        table[number % 61] = total
        numbers.append(table.get(number % 17, 0))
    return total + len(numbers)


def seconds_per_yardstick(number: int) -> float:
    start = perf_counter()
    for _ in range(number):
        yardstick()
    return (perf_counter() - start) / number


def measure(
    benchmark: Any,
    run: Callable[..., Any],
    prepare: Callable[[], Any] | None = None,
    rounds: int = ROUNDS,
    yardsticks_per_round: int = 1,
) -> Any:
    """The result of the last run(prepare()), or run() without it; prepare() is not timed.

    benchmark: pytest-benchmark's fixture. rounds, yardsticks_per_round: fewer and more for a run of many milliseconds.
    """
    yardsticks: list[float] = []
    warmup_rounds = min(WARMUP_ROUNDS, rounds // 4)

    def setup() -> Any:
        arguments = () if prepare is None else (prepare(),)
        yardsticks.append(seconds_per_yardstick(yardsticks_per_round))
        return arguments, {}

    result = benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
    if not benchmark.disabled:
        times = benchmark.stats.stats.data
        benchmark.extra_info.update(
            host=benchmark.name.removeprefix("test_"),
            microseconds=median(times) * 1e6,
            yardsticks=median(time / unit for time, unit in zip(times, yardsticks[warmup_rounds:], strict=True)),
        )
    return result
