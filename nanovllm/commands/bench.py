"""nanovllm bench: throughput on random prompts."""

import argparse
from typing import Any

from nanovllm.commands.options import add_command, add_model_options, open_llm


def add_parser(commands: Any) -> None:
    bench = add_command(commands, "bench", run, "measure throughput on random prompts")
    add_model_options(bench)
    bench.add_argument("--num-seqs", type=int, default=32, metavar="N", help="requests (default: %(default)s)")
    for name, what in (("--input-len", "prompt"), ("--output-len", "output")):
        text = f"{what} tokens of each request, drawn from this range (default: 16 128)"
        bench.add_argument(name, type=int, nargs=2, default=(16, 128), metavar=("MIN", "MAX"), help=text)
    bench.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from nanovllm.bench import run_bench

    with open_llm(arguments) as llm:
        run_bench(llm, arguments.num_seqs, tuple(arguments.input_len), tuple(arguments.output_len), arguments.seed)
    return 0
