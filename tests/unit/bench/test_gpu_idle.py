"""gpu_idle: arithmetic of intervals, and the windows of a scenario, with a scripted profiler and clock."""

from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import LLM
from nanovllm.bench import gpu_idle
from nanovllm.bench.gpu_idle import busy_time, gpu_idle_share, idle_share
from nanovllm.bench.workload import Scenario
from tests.support.tiny_models import tiny_model

DECODES = Scenario(3, (4, 9), (60, 60))
PREFILLS = Scenario(3, (40, 40), (2, 2), counts_input=True)
SHORT = Scenario(1, (4, 4), (6, 16))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(tiny_model("qwen3")), device="cpu", max_num_seqs=4, max_num_batched_tokens=50) as llm:
        yield llm


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9))))
def test_busy_time_is_the_length_of_the_union(pairs: list[tuple[int, int]]) -> None:
    """Intervals between integers: the union is as long as the number of unit intervals that one of them contains."""
    intervals = [(float(start), float(start + length)) for start, length in pairs]
    assert busy_time(intervals) == len({unit for start, length in pairs for unit in range(start, start + length)})


def test_the_idle_share_is_what_is_left_of_the_wall_time() -> None:
    assert idle_share(wall=4.0, busy=3.0) == 0.25
    assert idle_share(wall=4.0, busy=4.1) == 0.0, "a profiled window may be a little longer than the other"


@pytest.mark.parametrize(
    ("scenario", "num_steps", "share"),
    [(DECODES, gpu_idle.WINDOW_STEPS, 0.5), (PREFILLS, 4, 0.5), (SHORT, 4, 1 - (50 / 4) / (100 / 5))],
)
def test_the_windows_are_steps_of_the_kind_that_the_scenario_is_about(llm, monkeypatch, scenario, num_steps, share):
    """PREFILLS: 3 x 40 tokens in steps of 50, and a decode step. SHORT: a window of 5 steps and a profiled one of 4.

    A window takes 100 us by the clock; in the profiled one kernels run from 10 to 30 and from 20 to 50 us, and a copy
    from 60 to 70: it is busy in 50 us.
    """
    kinds: list[bool] = []
    step = llm.step

    def counted_step() -> Any:
        output = step()
        kinds.append(output.num_prefill_tokens > 0)
        return output

    class Profiler:
        """Counts the steps inside the profiled window."""

        def __init__(self, activities: list[Any], acc_events: bool) -> None:
            assert [activity.name for activity in activities] == ["CUDA"]
            assert acc_events, "torch warns that it clears events, and the suite makes errors of warnings"

        def __enter__(self) -> None:
            kinds.clear()

        def __exit__(self, *_: object) -> None:
            profiled.extend(kinds)

        def events(self) -> list[Any]:
            times = [("CUDA", 10, 30), ("CPU", 0, 1000), ("CUDA", 20, 50), ("CUDA", 60, 70)]
            return [
                SimpleNamespace(
                    time_range=SimpleNamespace(start=start, end=end),
                    device_type=getattr(torch.autograd.DeviceType, kind),
                )
                for kind, start, end in times
            ]

    profiled: list[bool] = []
    ticks = count()
    monkeypatch.setattr(llm, "step", counted_step)
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_idle, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 1e-4))
    assert gpu_idle_share(llm, scenario, count(5)) == pytest.approx(share)
    assert profiled == ([True] * (num_steps - 1) + [False] if scenario is PREFILLS else [False] * num_steps)
    assert llm.is_finished()


def test_a_scenario_without_decode_steps_has_no_share(llm, monkeypatch) -> None:
    """The requests are finished before the window begins."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_idle_share(llm, Scenario(2, (4, 4), (2, 2)), count()) is None
