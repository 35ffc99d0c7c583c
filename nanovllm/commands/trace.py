"""nanovllm trace: what the scheduler did while it generated, as a page for the browser."""

import argparse
import os
from pathlib import Path
from typing import Any

from nanovllm.commands.options import add_command, add_generation_options, open_generation

_EXAMPLE = """\
example, in which a small pool makes sequences share blocks and lose them:
  nanovllm trace --greedy --max-tokens 40 --attention-backend torch --kv-cache-block-size 8 --num-kv-cache-blocks 14 \\
    --max-num-seqs 3 "In the beginning God created" "The LORD is my shepherd" "Blessed are the meek" \\
    "In the beginning God created the heaven"
"""


def add_parser(commands: Any) -> None:
    trace = add_command(commands, "trace", run, "show what the scheduler did, as a page", " PROMPT [PROMPT ...]")
    trace.epilog, trace.formatter_class = _EXAMPLE, argparse.RawDescriptionHelpFormatter
    add_generation_options(trace)
    trace.add_argument(
        "--output", default="trace.html", metavar="FILE", help="the page; replaced if it exists (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    from nanovllm.schedule_trace import recording
    from nanovllm.trace_page import trace_page

    path = _checked_output(arguments.output)
    with open_generation(arguments) as (llm, prompts, inputs, params), recording(llm.scheduler) as trace:
        outputs = llm.generate(inputs, params)
    limits = ", ".join(f"{name} {getattr(llm.config, name)}" for name in ("max_num_seqs", "max_num_batched_tokens"))
    page = trace_page(trace, prompts, outputs, f"{llm.config.model}; {limits}")
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:  # a full disk
        raise ValueError(
            f"--output must be a file that can be written, got {arguments.output!r}: {error.strerror}; choose another"
        ) from error
    print(
        f"requests: {len(prompts)}, steps: {len(trace.steps)}, preemptions: {trace.num_preemptions}, "
        f"tokens found in the prefix cache: {trace.num_hit_tokens}"
    )
    print(f"written: {path}; open it in a browser")
    return 0


def _checked_output(output: str) -> Path:
    """The path of the page. Raises ValueError if it cannot be written, before anything is computed."""
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"--output must be a file, got the directory {output!r}; add a name, such as trace.html")
    if not path.parent.is_dir():
        raise ValueError(
            f"--output must be in a directory that exists, got {output!r}; make {str(path.parent)!r} first"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--output must be a file that can be written, got {output!r}; choose another")
    return path
