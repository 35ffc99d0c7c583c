"""benchmarks.scaling: how a step is divided, what is left out, what is shown; one rank, and the collectives of two."""

import json
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import scaling
from benchmarks.rank_costs import Collectives, measure_collectives
from benchmarks.scaling import WINDOW_STEPS, Point, Step, draw, measure_step, parse, possible_ranks, run, table
from benchmarks.step_model import Batch, Costs, StepTimes
from nanovllm import LLM, bundled_model_path
from nanovllm.bench.limits import Ceilings
from nanovllm.bench.workload import Scenario
from tests.support.checkpoints import small_config


def event(name: str, start: float, end: float, device: str) -> Any:
    time_range, device_type = SimpleNamespace(start=start, end=end), SimpleNamespace(name=device)
    return SimpleNamespace(name=name, time_range=time_range, device_type=device_type)


def point(num_ranks: int, speed: float, wall: float, predicted: float, scenario: str = "headline") -> Point:
    step = Step(Batch(256, 865.0), wall, wall / 2, wall / 4, wall / 4, 300.0)
    costs = Costs(Ceilings(4.35e12, 700e12), 1e-6, 60e-6, 20e-6, 90e-6)
    times = StepTimes(predicted, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return Point(scenario, num_ranks, (speed, speed - 1, speed + 1), step, times, costs, Collectives(9e-6, 20e-6, 9e-5))


POINTS = [
    point(1, 1000.0, 0.020, 0.019), point(2, 1800.0, 0.010, 0.011), point(2, 70.0, 0.004, 0.004, scenario="small"),
]  # fmt: skip


def test_a_step_on_a_gpu_is_timed_without_the_profiler_and_divided_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 1 ms by the clock. In the profiled window the GPU computes for 10 ms; collectives run for 7 ms, of
    which it computes meanwhile for 2.
    """
    kernels = [
        ("gemm", 0, 7_000, "CUDA"),
        ("ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgs)", 5_000, 11_000, "CUDA"),
        ("reduce_kernel", 12_000, 15_000, "CUDA"),
        ("one_shot_all_reduce_kernel", 16_000, 17_000, "CUDA"),
        ("host", 0, 90_000, "CPU"),
    ]

    class Profiler:
        def __init__(self, **_: Any) -> None:
            self.events = lambda: [event(*kernel) for kernel in kernels]

        def __enter__(self) -> "Profiler":
            return self

        def __exit__(self, *_: object) -> None:
            return None

    ticks = count()
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * 1e-3 * WINDOW_STEPS)
    monkeypatch.setattr(scaling, "time", clock)
    with LLM(str(bundled_model_path()), device="cpu", max_model_len=256, max_num_seqs=4) as llm:
        step = measure_step(llm, Scenario(3, (10, 20), (10, 30)), 1, has_gpu=True)
        assert llm.is_finished()
    assert step[1:] == pytest.approx((1e-3, 0.5e-3, 0.25e-3, 0.25e-3, 4 / WINDOW_STEPS))
    assert step.batch.num_seqs == 3
    assert 25 + WINDOW_STEPS / 2 < step.batch.num_tokens < 25 + WINDOW_STEPS, "half of 10 + 20, and of half of 10 + 30"


def test_ranks_beyond_the_gpus_are_left_out_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert possible_ranks([8, 1, 2, 2], "cuda", 2) == [1, 2]
    assert capsys.readouterr().out == "8 ranks: left out, since each needs a GPU of its own and torch finds 2\n"
    assert possible_ranks([4, 1], "cpu", 0) == [1, 4]
    assert capsys.readouterr().out == ""


def test_the_table_has_ratios_parts_and_the_error_of_the_prediction() -> None:
    lines = table(POINTS).splitlines()
    assert lines[0] == "headline: a decode step of 256 sequences of 865 tokens, in ms"
    assert lines[2].split() == ["1", "1,000", "999-1,001", "1.00", "20.00", "10.00", "5.00", "5.00", "19.00", "-5.0%"]
    assert lines[3].split() == ["2", "1,800", "1,799-1,801", "1.80", "10.00", "5.00", "2.50", "2.50", "11.00", "+10.0%"]
    assert "in us: kernel 1.00, smallest 9.0, all_reduce 20.0, gather 90.0" in lines[5]
    assert lines[8].split()[3] == "-", "small: one rank was not measured"


def test_the_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("matplotlib"):  # an extra
        draw(POINTS, tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 0
    monkeypatch.setattr(scaling, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--plot needs matplotlib"):
        run(parse(["--plot", str(tmp_path / "b.png")]), "")


def test_a_number_of_ranks_that_fails_is_reported_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_ranks(*arguments: Any) -> list[Point]:
        if arguments[-1] == 2:
            raise RuntimeError("rank 1 of 2 was killed")
        return [point(arguments[-1], 1000.0, 0.020, 0.019)]

    monkeypatch.setattr(scaling, "measure_ranks", measure_ranks)
    monkeypatch.setattr(scaling, "measure_ceilings", lambda *_: Ceilings(1.0, 1.0))
    failures = run(parse(["--device", "cpu", "--ranks", "1", "2", "4", "--json", str(tmp_path / "a.json")]), "")
    assert failures == ["2 ranks: FAILED: RuntimeError: rank 1 of 2 was killed"]
    stored = json.loads((tmp_path / "a.json").read_text())
    assert [row["num_ranks"] for row in stored["points"]] == [1, 4]
    assert (stored["failures"], stored["points"][0]["error"]) == (failures, pytest.approx(-0.05))
    assert failures[0] in capsys.readouterr().out


def test_one_rank_on_a_cpu_has_no_parts_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--ranks", "1", "--scenario", "small", "--scale", "0.01", "--repeat", "1", "--json"]
    assert run(parse([*words, str(tmp_path / "a.json")]), "") == []
    (row,) = json.loads((tmp_path / "a.json").read_text())["points"]
    assert row["tokens_per_second"][0] > 0
    assert row["step"]["batch"]["num_seqs"] == 1
    assert row["step"]["wall"] > 0
    assert row["step"]["compute"] is None
    (shown,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    1 ")]
    assert shown.split()[-5:] == ["-"] * 5


def test_collectives_of_two_ranks_take_some_time() -> None:
    sizes = small_config("llama", vocab_size=32)
    found = measure_collectives(sizes, torch.device("cpu"), torch.float32, [1, 3], 2)
    assert len(found) == 2
    assert all(seconds > 0 for times in found for seconds in times)
