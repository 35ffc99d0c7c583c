"""Throughput of the whole engine on a model of random weights, and where the time of a decode step goes.

    python -m benchmarks.engine [--scenario headline single] [--backend triton flash_attn] [--mode graphs waiting]
        [--profile]

Prints one line for each run: output tokens a second for decode-heavy scenarios, prompt tokens a second for the others,
over one generate() of all requests, without start-up and warm-up. Prompts are new in every run, so the prefix cache
holds only what a scenario shares on purpose. Runs scatter, so compare several (--repeat).
The scenarios are those of `nanovllm bench --scenario`, which measures latencies and the physical limit too.
"""

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.bench.gpu_idle import start_requests
from nanovllm.bench.workload import SCENARIOS, Scenario, draw_scenario

PROFILED_STEPS = 20
MODES: dict[str, dict[str, bool]] = {
    "graphs": {},  # the default
    "waiting": {"async_scheduling": False},  # with graphs; each step begins when the tokens of the one before are known
    "eager": {"enforce_eager": True},
}


def run_scenario(llm: Any, scenario: Scenario, seed: int) -> dict[str, float]:
    """Seconds, tokens in and out, and the scenario's figure in tokens a second."""
    prompts, params = draw_scenario(scenario, llm.vocab_size, seed)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    num_input, num_output = sum(map(len, prompts)), sum(len(output["token_ids"]) for output in outputs)
    counted = num_input if scenario.counts_input else num_output
    return {"seconds": seconds, "input": num_input, "output": num_output, "tokens_per_second": counted / seconds}


def profile_decode(llm: Any, num_seqs: int, input_len: int) -> None:
    """Print the wall time of a decode step, how long the GPU is busy in it, and on what."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def steps() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            llm.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / PROFILED_STEPS * 1e6

    max_tokens = 4 * PROFILED_STEPS
    scenario = Scenario(num_seqs, (input_len, input_len), (max_tokens, max_tokens))
    ids = start_requests(llm, draw_scenario(scenario, llm.vocab_size, random.randrange(2**32)), until_decode=True)
    wall = steps()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps()
    for seq_id in ids:
        llm.abort(seq_id)
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in events) / PROFILED_STEPS
    count = sum(event.count for event in events) / PROFILED_STEPS
    print(
        f"  decode step of {num_seqs} sequences of about {input_len} tokens: {wall:.0f} us wall, "
        f"GPU busy {busy:.0f} us in {count:.0f} kernels and copies, idle {max(0.0, wall - busy):.0f} us"
    )
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:15]:
        each = event.self_device_time_total / PROFILED_STEPS
        print(f"    {each:8.1f} us {each / busy:6.1%} {event.count / PROFILED_STEPS:6.1f} x  {event.key[:90]}")


def measure(model: str, backend: str, mode: str, arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Start an engine, run the scenarios, print and append what came out."""
    start = time.perf_counter()
    options = {"attention_backend": backend, "dtype": "bfloat16", **MODES[mode]}
    with LLM(model, max_model_len=4096, max_num_seqs=arguments.max_num_seqs, **options) as llm:
        llm.generate([[1] * 100] * 4, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        print(f"{backend}, {mode}: started in {time.perf_counter() - start:.1f} s", flush=True)
        for name in arguments.scenario:
            for repetition in range(arguments.repeat):
                figures = run_scenario(llm, SCENARIOS[name], repetition)
                results.append({"backend": backend, "mode": mode, "scenario": name, "seed": repetition, **figures})
                what = "in" if SCENARIOS[name].counts_input else "out"
                print(
                    f"  {name}: {figures['tokens_per_second']:,.0f} {what} tok/s "
                    f"({figures['input']:.0f} in, {figures['output']:.0f} out, {figures['seconds']:.2f} s)",
                    flush=True,
                )
        if arguments.profile:
            profile_decode(llm, 256, 800)
            profile_decode(llm, 1, 400)
            sys.stdout.flush()


def run_all(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every backend in every mode; one that fails is reported and the others go on."""
    results: list[dict[str, Any]] = []
    for mode in arguments.mode:
        for backend in arguments.backend:
            try:
                measure(model, backend, mode, arguments, results)
            except Exception as error:
                print(f"{backend}, {mode}: FAILED: {type(error).__name__}: {error}", flush=True)
            gc.collect()
    return results


def parse(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory (default: random weights in the shape of --like, made anew)")
    parser.add_argument("--like", default="qwen3-0.6b", help="see nanovllm/bench/random_model.py")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["headline", "single", "small", "prefill"])
    parser.add_argument("--backend", nargs="+", default=["triton", "flash_attn"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["graphs", "eager"])
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each scenario, with other prompts each")
    parser.add_argument("--profile", action="store_true", help="where a decode step's time goes")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            from nanovllm.bench.random_model import make_config, make_random_model

            make_random_model(Path(folder), make_config(arguments.like))
        results = run_all(arguments.model or folder, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    if not results:
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
