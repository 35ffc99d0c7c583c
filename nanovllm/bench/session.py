"""Measures scenarios on one LLM: throughput with all requests present, and latencies under request rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import numpy as np

from nanovllm.bench import gpu_idle
from nanovllm.bench.drive import RequestTimes, drive
from nanovllm.bench.limits import Ceilings, Limit, limit
from nanovllm.bench.workload import Scenario, draw_scenario, poisson_arrivals
from nanovllm.model_config import ModelConfig
from nanovllm.progress import Progress

SEEDS_PER_SESSION = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What to measure.

    scenarios: by name. rates: requests a second; each scenario is measured at each rate, and with all requests at once.
    seed: of all draws.
    """

    scenarios: dict[str, Scenario]
    rates: Sequence[float]
    num_repetitions: int
    seed: int

    @property
    def num_requests(self) -> int:
        """The number of all requests, including those of the warm-ups."""
        each = 1 + self.num_repetitions * (1 + len(self.rates))
        return each * sum(scenario.num_seqs for scenario in self.scenarios.values())


@dataclass(frozen=True)
class Percentiles:
    """Median and 99th percentile of times in seconds."""

    median: float
    p99: float


@dataclass(frozen=True)
class Repetition:
    """One run over a scenario's requests.

    seconds: from the start to the last token. With a rate, the first request arrives after the start.
    limit: None with a rate, since then the rate limits the throughput.
    """

    seed: int
    seconds: float
    num_input_tokens: int
    num_output_tokens: int
    limit: Limit | None

    def tokens_per_second(self, counted: str) -> float:
        return (self.num_input_tokens if counted == "in" else self.num_output_tokens) / self.seconds


@dataclass(frozen=True)
class Row:
    """One scenario under one load: medians over the repetitions, and percentiles over the requests of all of them.

    rate: requests a second; None if all requests are present at the start.
    counted: whether tokens_per_second counts the tokens "in" or "out".
    time_per_output_token: None if every request generates one token.
    fraction: seconds of the limit / seconds of the run. fraction, limit_tokens_per_second and gpu_idle are None with a
        rate; gpu_idle is also None on a CPU.
    """

    scenario: str
    rate: float | None
    num_seqs: int
    counted: str
    tokens_per_second: float
    limit_tokens_per_second: float | None
    fraction: float | None
    time_to_first_token: Percentiles
    time_per_output_token: Percentiles | None
    gpu_idle: float | None
    repetitions: tuple[Repetition, ...]


@dataclass(frozen=True)
class Target:
    """The engine to measure. dtype: that of weights and KV cache. has_gpu: whether it computes on a GPU."""

    llm: Any
    model: ModelConfig
    dtype: str
    ceilings: Ceilings
    has_gpu: bool


class MeasuringProgress(Progress):
    """A progress bar that counts requests and names the run."""

    label = ""

    def details(self) -> Sequence[str]:
        return [f", {self.label}", ""]


def measure(target: Target, plan: Plan) -> list[Row]:
    """All rows of the plan; of each scenario, first the row without a rate. Every repetition has new prompts."""
    llm, rows = target.llm, []
    seeds = count(plan.seed * SEEDS_PER_SESSION)
    progress = MeasuringProgress("Measuring", plan.num_requests, is_last_line_wanted=True)
    with progress:
        for name, scenario in plan.scenarios.items():
            progress.label = f"{name}, warm-up"
            drive(llm, draw_scenario(scenario, llm.vocab_size, next(seeds)), on_finished=progress.update)
            for rate in (None, *plan.rates):
                progress.label = name if rate is None else f"{name} at {rate:g}/s"
                runs = [_run(target, scenario, rate, next(seeds), progress) for _ in range(plan.num_repetitions)]
                idle = gpu_idle.gpu_idle_share(llm, scenario, seeds) if target.has_gpu and rate is None else None
                rows.append(make_row(name, scenario, rate, runs, idle))
    return rows


def _run(
    target: Target, scenario: Scenario, rate: float | None, seed: int, progress: Progress
) -> tuple[Repetition, list[RequestTimes]]:
    requests = draw_scenario(scenario, target.llm.vocab_size, seed)
    arrivals = None if rate is None else poisson_arrivals(scenario.num_seqs, rate, seed)
    times = drive(target.llm, requests, arrivals, progress.update)
    best = None
    if rate is None:
        best = limit(target.model, target.dtype, requests, scenario.num_shared, target.ceilings)
    num_input, num_output = sum(map(len, requests[0])), sum(request.num_tokens for request in times)
    return Repetition(seed, max(request.finish for request in times), num_input, num_output, best), times


def make_row(
    name: str,
    scenario: Scenario,
    rate: float | None,
    runs: Sequence[tuple[Repetition, list[RequestTimes]]],
    gpu_idle: float | None,
) -> Row:
    """The row of these runs, each a Repetition and the times of its requests."""
    counted, repetitions = scenario.counted, tuple(repetition for repetition, _ in runs)
    fractions = [run.limit.seconds / run.seconds for run in repetitions if run.limit is not None]
    rates = [run.tokens_per_second(counted) for run in repetitions]
    limits = [rate / fraction for rate, fraction in zip(rates, fractions, strict=False)]
    requests = [request for _, times in runs for request in times]
    per_token = [time for request in requests if (time := request.time_per_output_token) is not None]
    return Row(
        scenario=name,
        rate=rate,
        num_seqs=scenario.num_seqs,
        counted=counted,
        tokens_per_second=median(rates),
        limit_tokens_per_second=median(limits) if limits else None,
        fraction=median(fractions) if fractions else None,
        time_to_first_token=percentiles([request.time_to_first_token for request in requests]),
        time_per_output_token=percentiles(per_token) if per_token else None,
        gpu_idle=gpu_idle,
        repetitions=repetitions,
    )


def percentiles(times: Sequence[float]) -> Percentiles:
    """Median and 99th percentile, interpolated between the two nearest times."""
    middle, high = np.percentile(times, [50, 99])
    return Percentiles(float(middle), float(high))
