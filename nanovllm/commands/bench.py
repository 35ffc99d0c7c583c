"""nanovllm bench: throughput and latency on random prompts."""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from nanovllm.bench.random_model import SHAPES, make_config, make_random_model
from nanovllm.bench.workload import SCENARIOS, Scenario, draw_requests
from nanovllm.commands.options import CONFIG_HELP, add_command, add_model_options, flag, given, open_llm
from nanovllm.config import Config
from nanovllm.sampling_params import SamplingParams
from nanovllm.torchrun_env import read_torchrun_env
from nanovllm.validation import require_int, require_number

ALL = "all"
NUM_SEQS = 32  # without a scenario
LENGTHS = (16, 128)
_ONLY_WITHOUT_SCENARIO = ("input_len", "output_len")
_ONLY_WITH_SCENARIO = ("rate", "repeat", "scale", "results")
_REPORTED = ("like", "num_layers", "num_seqs", "seed", "scenario", "rate", "repeat", "scale")  # in the JSON file
_DEFAULT_REPETITIONS = 3
_SECONDS_PER_DAY = 86400

_EPILOG = """\
scenarios:
{scenarios}
  all        each of them

Without --scenario, one generate() of --num-seqs requests is timed once. On a machine without a GPU, and with the
bundled model, which takes at most 2048 tokens, this takes about half a minute on two cores:
  nanovllm bench --scenario all --scale 0.1 --rate 20
docs/performance.md says how to read the figures, and what the limit means.
"""


def add_parser(commands: Any) -> None:
    bench = add_command(commands, "bench", run, "measure throughput and latency on random prompts")
    bench.formatter_class = argparse.RawDescriptionHelpFormatter  # the scenarios are a list
    bench.epilog = _EPILOG.format(scenarios="\n".join(f"  {name:10} {_describe(s)}" for name, s in SCENARIOS.items()))
    add_model_options(bench)
    bench.add_argument("--like", choices=SHAPES, help="instead of --model: random weights in the shape of this model")
    bench.add_argument(
        "--num-layers", type=int, metavar="N", help="layers of --like's model (default: as many as it has)"
    )
    bench.add_argument("--num-seqs", type=int, metavar="N", help=f"requests (default: the scenario's, else {NUM_SEQS})")
    for name, what in (("--input-len", "prompt"), ("--output-len", "output")):
        low, high = LENGTHS
        text = f"{what} tokens of each request, drawn from this range; not with --scenario (default: {low} {high})"
        bench.add_argument(name, type=int, nargs=2, metavar=("MIN", "MAX"), help=text)
    bench.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random requests (default: %(default)s)"
    )
    group = bench.add_argument_group("scenarios")
    text = "what to measure, several or all: tokens a second, the fraction of the physical limit, latencies"
    group.add_argument("--scenario", nargs="+", choices=[*SCENARIOS, ALL], metavar="NAME", help=text)
    text = "also measure latencies while requests arrive at random, so many a second on average (Poisson)"
    group.add_argument("--rate", type=float, nargs="+", metavar="R", help=text)
    text = f"runs of each, with new prompts, after a warm-up that is not counted (default: {_DEFAULT_REPETITIONS})"
    group.add_argument("--repeat", type=int, metavar="N", help=text)
    text = "multiply requests and lengths, so that a slow machine ends within a minute: 0.1 (default: 1)"
    group.add_argument("--scale", type=float, metavar="F", help=text)
    text = "write bench.json and the picture bench.png there (without matplotlib: bench.txt)"
    group.add_argument("--results", type=Path, metavar="DIR", help=text)


def _describe(scenario: Scenario) -> str:
    def of(lengths: tuple[int, int]) -> str:
        low, high = lengths
        return str(low) if low == high else f"{low}-{high}"

    shared = f"{scenario.num_shared} shared and " if scenario.num_shared else ""
    return f"{scenario.num_seqs} x {shared}{of(scenario.input_len)} tokens in, {of(scenario.output_len)} out"


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    scenarios = _scenarios(arguments)
    with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as folder:  # for --like
        if arguments.like is not None:
            make_random_model(Path(folder), make_config(arguments.like, arguments.num_layers))
            arguments.model = folder
        if scenarios:
            _run_scenarios(arguments, scenarios)
        else:
            _run_plain(arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other, before anything is computed."""
    unused = _ONLY_WITH_SCENARIO if arguments.scenario is None else _ONLY_WITHOUT_SCENARIO
    wrong = ", ".join(flag(name) for name in unused if getattr(arguments, name) is not None)
    if wrong and arguments.scenario is None:
        raise ValueError(f"{wrong} needs a scenario: add --scenario, for example --scenario headline, or leave it out")
    if wrong:
        raise ValueError(f"a scenario has lengths of its own: leave out {wrong}, or use --scale for shorter ones")
    if arguments.like is not None and arguments.model is not None:
        raise ValueError(f"--like {arguments.like} makes a model and --model names one: leave out one of the two")
    if arguments.num_layers is not None and arguments.like is None:
        raise ValueError("--num-layers sets the layers of the model that --like makes: add --like, or leave it out")
    if arguments.like is not None and read_torchrun_env() is not None:
        raise ValueError(
            "--like makes a model that only this process could read, and torchrun has started several: write one with "
            f"python -m tools.make_random_model --like {arguments.like} DIR, and give --model DIR"
        )
    require_int("seed", arguments.seed, 0)
    for rate in arguments.rate or ():
        require_number("rate", rate, "a number above 0, in requests a second", lambda value: value > 0)
    for name, number in given(arguments, ("repeat", "num_seqs")).items():
        require_int(name, number, 1)
    if arguments.results is not None:
        if arguments.results.exists() and not arguments.results.is_dir():
            raise ValueError(f"results must be a directory, got the file {str(arguments.results)!r}; give another name")
        arguments.results.mkdir(parents=True, exist_ok=True)  # fails now, not after the measurement


def _scenarios(arguments: argparse.Namespace) -> dict[str, Scenario]:
    """The chosen scenarios by name; none without --scenario. Raises ValueError for a wrong scale, and for a rate with
    which a scenario would take longer than about a day.
    """
    chosen, scale = arguments.scenario or (), 1.0 if arguments.scale is None else arguments.scale
    scenarios = {name: SCENARIOS[name].scaled(scale) for name in SCENARIOS if name in chosen or ALL in chosen}
    if arguments.num_seqs is not None:
        scenarios = {name: dataclasses.replace(s, num_seqs=arguments.num_seqs) for name, s in scenarios.items()}
    for name, scenario in scenarios.items():
        lowest = float(f"{scenario.num_seqs / _SECONDS_PER_DAY:.1g}")
        rule = f"at least {lowest:g}, so that the {scenario.num_seqs} requests of {name!r} arrive within about a day"
        for rate in arguments.rate or ():
            if rate < lowest:
                raise ValueError(f"rate must be {rule}, got {rate!r}; raise it, or lower --num-seqs or --scale")
    return scenarios


def _run_plain(arguments: argparse.Namespace) -> None:
    """Generate once to warm up, then time one generate() of all requests and print what it did."""
    num_seqs = NUM_SEQS if arguments.num_seqs is None else arguments.num_seqs
    input_len, output_len = arguments.input_len or LENGTHS, arguments.output_len or LENGTHS
    with open_llm(arguments) as llm:
        max_model_len = llm.config.max_model_len
        remedy = f"a prompt leaves room for one generated token, and sequences have {max_model_len} at most"
        require_int("input_len's maximum", input_len[1], 1, max_model_len - 1, remedy)
        prompts, params = draw_requests(num_seqs, input_len, output_len, llm.vocab_size, arguments.seed)
        llm.generate([[1]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
    num_input = sum(map(len, prompts))
    num_output = sum(len(output["token_ids"]) for output in outputs)
    with_prompts = (num_input + num_output) / seconds
    print(f"{num_seqs} requests, {num_input} prompt tokens, {num_output} generated tokens in {seconds:.2f} s")
    num_cut = sum(len(output["token_ids"]) < drawn.max_tokens for output, drawn in zip(outputs, params, strict=True))
    if num_cut:
        print(f"outputs shorter than was drawn: {num_cut}, since a sequence has {max_model_len} tokens at most")
    print(f"throughput: {num_output / seconds:.1f} generated tok/s ({with_prompts:.1f} with the prompts counted in)")
    print("One run, prefill and decode together, every request present from the start, random prompts without common")
    print("prefixes. Runs scatter: compare several before you conclude anything.")


def _run_scenarios(arguments: argparse.Namespace, scenarios: dict[str, Scenario]) -> None:
    from nanovllm import bundled_model_path
    from nanovllm.bench.report import table, write
    from nanovllm.bench.scenarios import bench_scenarios
    from nanovllm.bench.session import Plan

    plan = Plan(scenarios, arguments.rate or (), arguments.repeat or _DEFAULT_REPETITIONS, arguments.seed)
    engine = given(arguments, CONFIG_HELP)
    config = Config(arguments.model or str(bundled_model_path()), **engine)
    name = f"random weights like {arguments.like}" if arguments.like else arguments.model or "the bundled model"
    options = {**engine, **given(arguments, _REPORTED)}
    result = bench_scenarios(lambda: open_llm(arguments), config, name, plan, options)
    print(table(result))
    if arguments.results is not None:
        for path in write(result, arguments.results):
            print(f"written: {path}")
