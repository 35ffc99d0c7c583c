"""Tokens a second of generate on the CPU, beside transformers' own generate: one prompt alone, and eight together.

    make real-model && python -m benchmarks.cpu_generate [--dtype float32 bfloat16] [--rounds 5] [--tokens 64]

Each engine runs in a process of its own, which loads the model once and waits. The two compute in turns, so that other
load on the machine affects both. A figure is the number of generated tokens divided by the time of the whole call,
prompts included; decoding is greedy and ignores the end-of-sequence token. The table has the best and the median of the
rounds: on a shared machine other processes disturb the best round least. CPU ms: the processor time of all threads for
each generated token, in the round with the least of it. Each engine chooses its number of threads; OMP_NUM_THREADS
overrides that.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tools.real_model import REAL_MODEL

END_SECONDS = 10  # for a process to end by itself
QUESTIONS = [
    "Why is the sky blue?",
    "Write a short story about a lighthouse and the man in it.",
    "Explain how a bicycle stays upright, in simple words.",
    "What should I cook tonight with rice, eggs and tomatoes?",
    "Name five inventions of the last century.",
    "How do I write a for loop in Python?",
    "Describe the sea to a child.",
    "What is the difference between weather and climate?",
]
CASES = {"one prompt": QUESTIONS[:1], "eight together": QUESTIONS}


def nanovllm_generate(model: str, dtype: str, num_tokens: int) -> Callable[[list[list[int]]], int]:
    """A function that generates num_tokens after each prompt and returns the number of all generated tokens."""
    from nanovllm import LLM, SamplingParams

    llm = LLM(model, device="cpu", dtype=dtype)
    params = SamplingParams.greedy(max_tokens=num_tokens, ignore_eos=True)
    return lambda prompts: sum(len(output["token_ids"]) for output in llm.generate(prompts, params, use_tqdm=False))


def transformers_generate(model: str, dtype: str, num_tokens: int) -> Callable[[list[list[int]]], int]:
    """The same with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def generate(prompts: list[list[int]]) -> int:
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        options = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        output = llm.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
        return output[:, inputs["input_ids"].shape[1] :].numel()

    return generate


ENGINES = {"nanovllm": nanovllm_generate, "transformers": transformers_generate}


def serve(connection: Any, engine: str, *arguments: Any) -> None:
    """Load the engine; then, for each list of prompts received, send back (tokens, seconds, processor seconds)."""
    generate = ENGINES[engine](*arguments)
    connection.send("ready")
    while prompts := connection.recv():
        start, cpu_start = time.perf_counter(), time.process_time()
        num_tokens = generate(prompts)
        connection.send((num_tokens, time.perf_counter() - start, time.process_time() - cpu_start))


@contextmanager
def running(*arguments: Any) -> Iterator[dict[str, Callable[[list[list[int]]], tuple[int, float, float]]]]:
    """engine -> function that generates in the engine's process, which runs inside the `with` block."""
    context = multiprocessing.get_context("spawn")
    calls, processes, ends = {}, [], []
    try:
        for engine in ENGINES:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, engine, *arguments), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
            ours.recv()  # raises EOFError if the process failed, after its traceback
            calls[engine] = lambda prompts, end=ours: (end.send(prompts), end.recv())[1]
        yield calls
    finally:
        for process, end in zip(processes, ends, strict=True):
            with suppress(OSError):  # a process that failed has ended
                end.send([])
            process.join(END_SECONDS)
            process.terminate()
            process.join()


def measure(model: Path, dtype: str, prompts: dict[str, list[list[int]]], num_tokens: int, rounds: int) -> None:
    """Print the rows of this dtype."""
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with running(str(model), dtype, num_tokens) as engines:
        for number in range(-1, rounds):  # the first one warms up
            for case in prompts:
                for engine, generate in engines.items():
                    generated, seconds, cpu_seconds = generate(prompts[case])
                    if number >= 0:
                        runs.setdefault((case, engine), []).append((generated / seconds, cpu_seconds / generated))
    for case in prompts:
        rates = {engine: [rate for rate, _ in runs[case, engine]] for engine in ENGINES}
        cells = [f"{max(rates[engine]):8.1f} {statistics.median(rates[engine]):7.1f}" for engine in ENGINES]
        cpu = [f"{1000 * min(cost for _, cost in runs[case, engine]):8.1f}" for engine in ENGINES]
        ratio = max(rates["nanovllm"]) / max(rates["transformers"])
        print(f"{dtype:9} {case:15} {'  '.join(cells)}  {ratio:5.2f}  {' '.join(cpu)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REAL_MODEL, help="a directory (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="to generate after each prompt")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").exists():
        print(f"error: no model in {arguments.model}; make real-model makes it", file=sys.stderr)
        return 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = {case: [tokenizer.encode(question) for question in questions] for case, questions in CASES.items()}
    threads = os.environ.get("OMP_NUM_THREADS", "as many as each chooses")
    print(f"{arguments.model.name}, {arguments.tokens} tokens after each prompt, {arguments.rounds} rounds")
    print(f"{len(os.sched_getaffinity(0))} CPUs, threads: {threads}, load average {os.getloadavg()[0]:.1f}")
    print("tokens/s:                 nanovllm          transformers             CPU ms a token")
    print("dtype     case                best  median      best  median  ratio      ours   theirs")
    for dtype in arguments.dtype:
        measure(arguments.model, dtype, prompts, arguments.tokens, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
