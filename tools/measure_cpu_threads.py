"""Measures steps of random models with 1, 2, ... threads on the CPU, on an idle machine and with busy processes.

    python -m tools.measure_cpu_threads [--hidden-sizes 128 512] [--busy 0 2] [--threads 1 2]

worker/cpu_threads.py chooses the number of threads by these numbers. A row has the hidden size, the tokens of a step,
the floating-point operations of a step in one layer, the number of busy processes, and the mean milliseconds of a step
for each number of threads (with busy processes some steps take a hundred times as long as others). A step of 1 token is
a decode step; a larger one is a prefill of one prompt.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NUM_LAYERS = 4
TOKENS = (1, 8, 64, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, 2, len(os.sched_getaffinity(0))}))
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, len(os.sched_getaffinity(0))], help="number of busy processes"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps, for each number in the table")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # for the processes that this program starts
    arguments = parser.parse_args()
    if arguments.measure:
        _measure(*arguments.measure, arguments.seconds)
        return
    print(f"{len(os.sched_getaffinity(0))} CPUs, load average {os.getloadavg()[0]:.1f} at the start")
    print("hidden tokens flop/layer  busy " + "".join(f"{number:>4} threads" for number in arguments.threads))
    with tempfile.TemporaryDirectory() as folder:
        for hidden_size in arguments.hidden_sizes:
            model = _make_model(Path(folder) / str(hidden_size), hidden_size)
            for busy in arguments.busy:
                with _busy_processes(busy):
                    columns = [_steps(model, number, arguments.seconds) for number in arguments.threads]
                for tokens, *times in zip(TOKENS, *columns, strict=True):
                    flop = 2 * tokens * layer_parameters(hidden_size)
                    numbers = "".join(f"{1000 * seconds:9.2f} ms" for seconds in times)
                    print(f"{hidden_size:6} {tokens:6} {flop:10.1e} {busy:5} {numbers}", flush=True)


def layer_parameters(hidden_size: int) -> int:
    """Number of parameters of a layer's matrices: q, k, v, o and three of the MLP."""
    return (4 + 3 * 3) * hidden_size**2


def _make_model(folder: Path, hidden_size: int) -> Path:
    from transformers import LlamaConfig

    from nanovllm.bench.random_model import make_random_model

    heads = max(1, hidden_size // 64)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=NUM_LAYERS, vocab_size=2048,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048,
    )  # fmt: skip
    make_random_model(folder, config)
    return folder


@contextmanager
def _busy_processes(number: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _steps(model: Path, num_threads: int, seconds: float) -> list[float]:
    """Seconds of a step for each of TOKENS, in a process with that many threads."""
    command = [sys.executable, "-m", "tools.measure_cpu_threads", "--measure", str(model), str(num_threads)]
    command += ["--seconds", str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(word) for word in result.stdout.split()]


def _measure(model: str, num_threads: str, max_seconds: float) -> None:
    import torch

    from nanovllm import LLM, SamplingParams

    assert torch.get_num_threads() == int(num_threads)
    blocks = {"num_kv_cache_blocks": 16, "kv_cache_block_size": 256, "max_model_len": 2048}
    with LLM(model, device="cpu", dtype="float32", **blocks) as llm:
        for tokens in TOKENS:
            times: list[float] = []
            number = 0
            while len(times) < 5 or sum(times) < max_seconds:
                number += 1
                prompt = [1 + number % 2000] + [7] * (tokens - 1)
                llm.add_request(prompt, SamplingParams.greedy(max_tokens=8 if tokens == 1 else 1, ignore_eos=True))
                while not llm.is_finished():
                    start = time.perf_counter()
                    llm.step()
                    times.append(time.perf_counter() - start)
            print(statistics.fmean(times[2:]))  # the first ones allocate


if __name__ == "__main__":
    main()
