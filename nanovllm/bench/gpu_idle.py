"""The share of the time in which the GPU is idle, in a short part of a scenario.

Two windows of steps, each with new prompts: one without the profiler gives the wall time of a step, and one with it the
time in which a kernel or a copy runs. (The profiler slows the host, so that window's wall time is not used.)
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from nanovllm.bench.workload import Requests, Scenario, draw_scenario
from nanovllm.omp_wait_policy import passive_omp_wait

with passive_omp_wait():  # this may be the first import of torch in the process
    import torch

WINDOW_STEPS = 20
SETTLING_STEPS = 3  # decode steps that are not measured, before a window of decode steps


def gpu_idle_share(llm: Any, scenario: Scenario, seeds: Iterator[int]) -> float | None:
    """The idle share of the GPU that this process uses, in [0, 1]; None if the scenario ends before the window.

    If the scenario's figure counts prompt tokens, the window is its first steps, otherwise decode steps after all
    prompts are computed. The engine must compute on a GPU and have no other requests.
    """
    from torch.profiler import ProfilerActivity, profile

    wall, num_steps = _window(llm, scenario, next(seeds), nullcontext())
    if not num_steps:
        return None
    profiler = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
    _, num_profiled_steps = _window(llm, scenario, next(seeds), profiler)
    if not num_profiled_steps:
        return None
    intervals = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"  # the events of the host are of type CPU
    ]
    wall_us = wall * 1e6 / num_steps  # the profiler's times are in microseconds
    return idle_share(wall_us, busy_time(intervals) / num_profiled_steps)


def idle_share(wall: float, busy: float) -> float:
    return max(0.0, 1.0 - busy / wall)


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of the intervals (start, end): kernels and copies may run at the same time."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _window(llm: Any, scenario: Scenario, seed: int, profiler: AbstractContextManager[Any]) -> tuple[float, int]:
    """The wall time in seconds of at most WINDOW_STEPS steps, and their number."""
    ids = start_requests(llm, draw_scenario(scenario, llm.vocab_size, seed), until_decode=not scenario.counts_input)
    num_steps = 0
    with profiler:
        torch.cuda.synchronize()
        start = time.perf_counter()
        while num_steps < WINDOW_STEPS and not llm.is_finished():
            llm.step()
            num_steps += 1
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    end_requests(llm, ids)
    return seconds, num_steps


def start_requests(llm: Any, requests: Requests, until_decode: bool) -> list[int]:
    """Add the requests and return their ids; with until_decode, step until all decode, and SETTLING_STEPS more."""
    ids = [llm.add_request(prompt, params) for prompt, params in zip(*requests, strict=True)]
    if until_decode:
        while llm.scheduler.waiting or any(not seq.is_decodable for seq in llm.scheduler.running):
            llm.step()
        for _ in range(SETTLING_STEPS):
            llm.step()
    return ids


def end_requests(llm: Any, ids: list[int]) -> None:
    """Abort the requests that are not finished, and step until the engine has none."""
    for seq_id in ids:
        llm.abort(seq_id)
    while not llm.is_finished():
        llm.step()
