"""The `nanovllm` command: its entry point, exit codes and list of commands. Each command is a module of commands/.

torch and transformers are imported only by the commands that run a model, so that `--help` is quick. The commands
themselves, and numpy with them, are imported by main(), which handles Ctrl-C.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from nanovllm import __version__
from nanovllm.cli_errors import report_error
from nanovllm.console import INTERRUPTED, discard, exit_on_sigterm, flush_stdout, lossless_console, require_stdout
from nanovllm.torchrun_env import read_torchrun_env

COMMANDS = ("generate", "demo", "chat", "bench", "trace", "conformance")
BROKEN_PIPE = 141  # 128 + SIGPIPE

_EXAMPLES = """\
examples:
  nanovllm demo                                      what the engine does, in a minute, without a GPU or a download
  nanovllm generate "In the beginning"               one prompt, streamed, from the bundled model
  nanovllm generate --model Qwen/Qwen3-0.6B --chat "Why is the sky blue?"
  nanovllm generate --model ./my-model -             one prompt a line from standard input
  nanovllm chat --model Qwen/Qwen3-0.6B              a conversation at the terminal
  nanovllm bench --model ./my-model --num-seqs 256   throughput
  nanovllm trace --model ./my-model - < prompts.txt  what the scheduler did, as a page for the browser
  nanovllm conformance ../my-fork                    which contracts a fork of nano-vllm breaks, and how to see it

exit codes: 0 done; 1 the demo found a difference, or conformance a broken contract; 2 an error whose message names
a remedy; 70 a bug of nanovllm; 130 interrupted by Ctrl-C; 141 the reader of the output closed the pipe;
143 ended by SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv[1:] if None) and return its exit code; argparse's errors exit with 2."""
    with lossless_console():
        try:
            return _run(_parser().parse_args(argv))
        except KeyboardInterrupt:
            print("\nnanovllm: interrupted", file=sys.stderr)
            return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    from nanovllm.commands.options import open_llm, option_names

    try:
        require_stdout()
        launch = read_torchrun_env()
        if launch is not None and launch.rank > 0 and "model" in arguments:
            open_llm(arguments)  # serves rank 0, which alone reads and prints, and does not return
        with exit_on_sigterm(), _log_on_stderr():
            code = arguments.run(arguments)
        sys.stdout.flush()  # raises BrokenPipeError here rather than at interpreter exit
        return code
    except BrokenPipeError:
        discard(sys.stdout)
        return BROKEN_PIPE
    except Exception as error:
        code = report_error(error, option_names(arguments), arguments.debug)
        flush_stdout()
        return code


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show on stderr what the engine logs while a command runs, such as the attention backend and the reason."""
    logger, handler = logging.getLogger("nanovllm"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanovllm",
        description="A small LLM inference engine: generate text from a local model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        import_module(f"nanovllm.commands.{command}").add_parser(commands)
    return parser
