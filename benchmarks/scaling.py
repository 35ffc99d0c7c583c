"""Tokens a second with 1, 2, 4 and 8 ranks, where a decode step's time goes, and what step_model.py predicts for it.

    python -m benchmarks.scaling --like llama-3-8b --ranks 1 2 4 8 [--scenario headline small] [--json F] [--plot F.png]

One engine after the other, each over the same scenarios (nanovllm bench's). A decode step is one in the middle of the
scenario: all its requests, each with the mean prompt and half the mean output. `step` is the wall time of a step;
torch.profiler on rank 0 divides it into the time in which a kernel other than a collective runs (GPU), the rest of the
time in which a collective runs (all-reduce: waiting for other ranks counts, and so does the gather of tokens), and
the time in which the GPU is idle (host). The prediction is from costs that are measured in this run, on as many ranks.
Without a GPU the bundled model shows how it works, without parts and prediction: --ranks 1 2 --scale 0.03 --repeat 1
"""

import argparse
import gc
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rank_costs import Collectives, measure_costs
from benchmarks.step_model import Batch, Costs, StepTimes, step_times
from nanovllm import LLM, bundled_model_path
from nanovllm.bench.ceilings import measure_ceilings
from nanovllm.bench.gpu_idle import WINDOW_STEPS, busy_time, end_requests, start_requests
from nanovllm.bench.limits import Ceilings
from nanovllm.bench.machine import machine_info
from nanovllm.bench.random_model import SHAPES, make_config, make_random_model
from nanovllm.bench.scenarios import check_lengths, describe_model
from nanovllm.bench.session import SEEDS_PER_SESSION, Plan, Target, measure
from nanovllm.bench.workload import SCENARIOS, Scenario, draw_scenario
from nanovllm.distributed import torch
from nanovllm.distributed.placement import resolve_device
from nanovllm.model_config import ModelConfig
from nanovllm.models.registry import load_model_config
from nanovllm.validation import require_int

MAX_MODEL_LEN = 4096
COLLECTIVE = re.compile(r"nccl|all_?reduce|multimem", re.IGNORECASE)  # in names of kernels
WINDOW_OUTPUT = 4 * WINDOW_STEPS  # tokens of a request, so that none ends within two windows


class Step(NamedTuple):
    """A decode step: seconds, and kernels a step. All but `wall` are None on a CPU."""

    batch: Batch
    wall: float
    compute: float | None = None
    collectives: float | None = None
    host: float | None = None
    num_kernels: float | None = None


class Point(NamedTuple):
    """One scenario with one number of ranks. tokens_per_second: the median of the runs, the lowest, the highest."""

    scenario: str
    num_ranks: int
    tokens_per_second: tuple[float, float, float]
    step: Step
    predicted: StepTimes
    costs: Costs
    collectives: Collectives

    @property
    def error(self) -> float:
        """Of the prediction, as a fraction of the measured step."""
        return self.predicted.seconds / self.step.wall - 1


def measure_ranks(
    directory: str, model: ModelConfig, device: torch.device, ceilings: Ceilings, plan: Plan, num_ranks: int
) -> list[Point]:
    """A point of each scenario of the plan. Starts and closes an engine. ceilings: of one device."""
    model.check_tensor_parallel_size(num_ranks)  # as the engine will, but before the ranks measure
    scenarios, has_gpu = plan.scenarios, device.type == "cuda"
    sizes = [scenario.num_seqs for scenario in scenarios.values()]
    all_costs = measure_costs(model, device, ceilings, sizes, num_ranks)
    last_seed = (plan.seed + 1) * SEEDS_PER_SESSION - 1  # measure() takes the first ones
    max_len = min(MAX_MODEL_LEN, model.max_supported_len)
    options = {"device": device.type, "max_model_len": max_len, "max_num_seqs": max(sizes)}
    points = []
    with LLM(directory, tensor_parallel_size=num_ranks, **options) as llm:
        rows = measure(Target(llm, model, model.dtype, ceilings, has_gpu=False), plan)  # its idle time is split()'s too
        for index, (row, (costs, collectives)) in enumerate(zip(rows, all_costs, strict=True)):
            step = measure_step(llm, scenarios[row.scenario], last_seed - index, has_gpu)
            speeds = [repetition.tokens_per_second(row.counted) for repetition in row.repetitions]
            predicted = step_times(model, model.dtype, step.batch, num_ranks, costs)
            speed = (row.tokens_per_second, min(speeds), max(speeds))
            points.append(Point(row.scenario, num_ranks, speed, step, predicted, costs, collectives))
    gc.collect()
    return points


def measure_step(llm: Any, scenario: Scenario, seed: int, has_gpu: bool) -> Step:
    """A decode step in the middle of the scenario, on an engine without other requests."""
    middle = round(sum(scenario.input_len) / 2 + sum(scenario.output_len) / 4)
    length = max(1, min(middle, llm.config.max_model_len - scenario.num_shared - WINDOW_OUTPUT))
    window = Scenario(scenario.num_seqs, (length, length), (WINDOW_OUTPUT, WINDOW_OUTPUT), scenario.num_shared)
    ids = start_requests(llm, draw_scenario(window, llm.vocab_size, seed), until_decode=True)
    lengths = [len(seq) for seq in llm.scheduler.running]
    batch = Batch(len(lengths), sum(lengths) / len(lengths) + WINDOW_STEPS / 2)
    step = Step(batch, _seconds_of_step(llm, has_gpu))
    if has_gpu:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            _seconds_of_step(llm, has_gpu)
        events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
        step = Step(batch, step.wall, *split(step.wall, events, WINDOW_STEPS))
    end_requests(llm, ids)
    return step


def _seconds_of_step(llm: Any, has_gpu: bool) -> float:
    if has_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(WINDOW_STEPS):
        llm.step()
    if has_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / WINDOW_STEPS


def split(wall: float, events: Iterable[Any], num_steps: int) -> tuple[float, float, float, float]:
    """Seconds of a step in which the GPU computes, in which only collectives run, in which it is idle; kernels a step.

    events: torch.profiler's of the GPU, in microseconds, over num_steps steps. wall: seconds of a step without it.
    """
    found = [(event.name, event.time_range.start, event.time_range.end) for event in events]
    per_step = 1e-6 / num_steps
    busy = busy_time((start, end) for _, start, end in found) * per_step
    compute = busy_time((start, end) for name, start, end in found if not COLLECTIVE.search(name)) * per_step
    return compute, busy - compute, max(0.0, wall - busy), len(found) / num_steps


def possible_ranks(ranks: Sequence[int], device_type: str, num_gpus: int) -> list[int]:
    """Those that have a GPU each, ascending; prints a line for each of the others. A CPU takes all of them."""
    chosen = []
    for number in sorted(set(ranks)):
        require_int("ranks", number, 1)
        if device_type == "cuda" and number > num_gpus:
            print(f"{number} ranks: left out, since each needs a GPU of its own and torch finds {num_gpus}")
        else:
            chosen.append(number)
    return chosen


def table(points: Sequence[Point]) -> str:
    """A table of each scenario, in milliseconds, and what the prediction is made of."""
    lines = []
    for name in dict.fromkeys(point.scenario for point in points):
        chosen = [point for point in points if point.scenario == name]
        batch, counted = chosen[0].step.batch, SCENARIOS[name].counted
        lines += [
            f"{name}: a decode step of {batch.num_seqs} sequences of {batch.num_tokens:.0f} tokens, in ms",
            f"ranks {counted + ' tok/s':>12} {'lowest-highest':>17} ratio     step      GPU all-reduce     host "
            "predicted   error",
        ]
        for point in chosen:
            step, (speed, *scatter) = point.step, point.tokens_per_second
            ratio = ratio_to_one(point, chosen)
            is_predicted = step.compute is not None  # the model leaves out what a step takes on a CPU
            lines.append(
                f"{point.num_ranks:5} {speed:12,.0f} {'-'.join(f'{end:,.0f}' for end in scatter):>17} "
                f"{'-' if ratio is None else f'{ratio:.2f}':>5} {_ms(step.wall):>8} {_ms(step.compute):>8} "
                f"{_ms(step.collectives):>10} {_ms(step.host):>8} "
                f"{_ms(point.predicted.seconds) if is_predicted else '-':>9} "
                f"{f'{point.error:+.1%}' if is_predicted else '-':>7}"
            )
        for point in chosen if chosen[0].step.compute is not None else ():
            (ceilings, kernel, *_), collectives = point.costs, point.collectives
            parts = ", ".join(f"{part} {_ms(value)}" for part, value in point.predicted._asdict().items())
            lines.append(
                f"  {point.num_ranks} predicted: {parts}. Measured alone: read {ceilings.memory / 1e12:.2f} TB/s, "
                f"product {ceilings.matmul / 1e12:.0f} TFLOP/s; in us: kernel {kernel * 1e6:.2f}, "
                + ", ".join(f"{part} {value * 1e6:.1f}" for part, value in collectives._asdict().items())
            )
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def ratio_to_one(point: Point, points: Sequence[Point]) -> float | None:
    """Of tokens a second; None if one rank was not measured."""
    single = [other.tokens_per_second[0] for other in points if other.num_ranks == 1]
    return point.tokens_per_second[0] / single[0] if single else None


def as_json(value: Any) -> Any:
    """Named tuples and Ceilings as objects, and the error of a Point."""
    if isinstance(value, Point):
        return {**{name: as_json(part) for name, part in zip(value._fields, value, strict=True)}, "error": value.error}
    if hasattr(value, "_asdict"):
        return {name: as_json(part) for name, part in value._asdict().items()}
    return vars(value) if isinstance(value, Ceilings) else value


def draw(points: Sequence[Point], path: Path) -> None:
    """Measured steps as bars of their parts, predicted ones as marks, with tokens a second. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(point.scenario for point in points))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        chosen = [point for point in points if point.scenario == name]
        labels, top = [str(point.num_ranks) for point in chosen], [0.0] * len(chosen)
        has_parts = chosen[0].step.compute is not None
        for part in ("compute", "collectives", "host") if has_parts else ("wall",):
            heights = [1e3 * getattr(point.step, part) for point in chosen]
            axes.bar(labels, heights, bottom=top, label=part)
            top = [low + height for low, height in zip(top, heights, strict=True)]
        if has_parts:
            axes.plot(labels, [1e3 * p.predicted.seconds for p in chosen], "k_", markersize=30, label="predicted")
        for label, height, point in zip(labels, top, chosen, strict=True):
            axes.annotate(f"{point.tokens_per_second[0]:,.0f} tok/s", (label, height), ha="center", va="bottom")
        axes.set(title=name, xlabel="ranks", ylabel="ms of a decode step")
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=SHAPES, help="random weights of this shape (default: the bundled model)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["headline", "small"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the requests and their lengths")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each scenario after a warm-up")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--json", type=Path, help="write the figures there, anew after each number of ranks")
    parser.add_argument("--plot", type=Path, help="draw them there (needs matplotlib)")
    return parser.parse_args(words)


def run(arguments: argparse.Namespace, folder: str) -> list[str]:
    """Measure and show all that can be; what failed, in words. folder: for the weights of --like."""
    device = resolve_device(arguments.device)
    all_ranks = possible_ranks(arguments.ranks, device.type, torch.cuda.device_count())
    require_int("repeat", arguments.repeat, 1)
    for path in filter(None, (arguments.json, arguments.plot)):  # what cannot be written fails before the measurement
        if not path.parent.is_dir():
            raise ValueError(f"the directory of {str(path)!r} must exist: make it, or give another name")
    if arguments.plot and not find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install -e '.[bench]', or leave it out")
    scenarios = {name: SCENARIOS[name].scaled(arguments.scale) for name in arguments.scenario}
    directory = str(bundled_model_path())
    if arguments.like is not None:
        directory = folder
        make_random_model(Path(folder), make_config(arguments.like))
        gc.collect()
    model = load_model_config(Path(directory))
    check_lengths(scenarios, MAX_MODEL_LEN, model.max_supported_len)
    ceilings = measure_ceilings(device, model.dtype)
    machine = machine_info(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    named = describe_model(model, arguments.like or "the bundled model", model.dtype)
    points: list[Point] = []
    failures: list[str] = []
    for number in all_ranks:
        start = time.perf_counter()
        try:
            points += measure_ranks(
                directory, model, device, ceilings, Plan(scenarios, (), arguments.repeat, 0), number
            )
        except Exception as error:  # the other numbers of ranks are measured all the same
            failures.append(f"{number} ranks: FAILED: {type(error).__name__}: {error}")
        print(f"{number} rank(s): {time.perf_counter() - start:.0f} s", flush=True)
        if arguments.json:
            result = {"machine": machine, "model": named, "failures": failures, "points": [*map(as_json, points)]}
            arguments.json.write_text(json.dumps(result, indent=1))
    shown = ", ".join(f"{key} {value}" for key, value in machine.items() if value)
    print("\n".join(filter(None, [table(points), shown, *failures])))
    if points and arguments.plot:
        draw(points, arguments.plot)
    return failures


def main() -> None:
    arguments = parse()
    try:
        with tempfile.TemporaryDirectory(prefix="nanovllm-scaling-") as folder:
            failures = run(arguments, folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
