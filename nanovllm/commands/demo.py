"""nanovllm demo: the engine's output beside transformers' own, on the bundled model."""

import argparse
from typing import Any

from nanovllm.commands.options import add_command


def add_parser(commands: Any) -> None:
    add_command(commands, "demo", run, "what the engine does, in a minute, without a GPU or a download")


def run(arguments: argparse.Namespace) -> int:
    from nanovllm.demo import run_demo

    return run_demo()
