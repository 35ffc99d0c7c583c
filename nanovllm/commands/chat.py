"""nanovllm chat: a conversation at the terminal, or one whose messages are the lines of standard input."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from nanovllm.cli_errors import report_error
from nanovllm.commands.options import (
    add_command,
    add_model_options,
    add_sampling_options,
    open_llm,
    option_names,
    sampling_params,
)
from nanovllm.console import typed_lines
from nanovllm.sampling_params import SamplingParams

MAX_TOKENS = 512  # of an answer: more than a request without --max-tokens gets from the other commands
HELP = "/new starts another conversation, /quit or Ctrl-D ends the chat, Ctrl-C ends an answer"


def add_parser(commands: Any) -> None:
    chat = add_command(commands, "chat", run, "talk to a model that has a chat template", " --model DIR_OR_ID")
    chat.epilog = f"While it runs: {HELP}. A pipe or file as standard input holds one message a line."
    add_model_options(chat, is_model_required=True)
    add_sampling_options(chat, max_tokens=MAX_TOKENS)
    chat.add_argument("--system", metavar="TEXT", help="the system message of the conversation")


def run(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    with open_llm(arguments) as llm:
        if not getattr(llm.tokenizer, "chat_template", None):
            raise ValueError(
                f"model must have a chat template, and {arguments.model!r} has none; name a model that was trained for "
                "chat, or continue texts with nanovllm generate"
            )
        if is_terminal:
            print(HELP, file=sys.stderr)
        start = [{"role": "system", "content": arguments.system}] if arguments.system else []
        conversation = start
        for line in _lines(is_terminal):
            if line == "/new":
                conversation = start
            elif line.startswith("/") and line[1:].isalpha():
                print(f"{line} is no command: {HELP}", file=sys.stderr)
            else:
                question = [*conversation, {"role": "user", "content": line}]
                try:
                    conversation = [*question, {"role": "assistant", "content": _answer(llm, question, params)}]
                except ValueError as error:  # such as a conversation longer than max_model_len
                    if not is_terminal:
                        raise
                    report_error(error, option_names(arguments), arguments.debug)
                    print("the message is not part of the conversation; /new starts another one", file=sys.stderr)
    return 0


def _lines(is_terminal: bool) -> Iterator[str]:
    """The lines of standard input that are not blank, up to /quit; a terminal shows a prompt and edits lines."""
    if is_terminal:
        with contextlib.suppress(ImportError):  # on Windows, input() edits lines without it
            import readline  # noqa: F401
    while True:
        try:
            for line in map(str.strip, typed_lines("> " if is_terminal else "")):
                if line == "/quit":
                    return
                if line:
                    yield line
            break
        except ValueError as error:  # bytes that are no text
            if not is_terminal:
                raise
            report_error(error, {}, is_debug=False)
    if is_terminal:
        print()  # after the prompt, for the shell's own


def _answer(llm: Any, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Print the next message as it is generated, and return it. Ctrl-C ends it; the text up to there counts."""
    texts, finish_reason = [], None
    with _deferred_ctrl_c() as is_interrupted, contextlib.closing(llm.chat_stream(messages, params)) as stream:
        for item in stream:
            print(item["text"], end="", flush=True)
            texts.append(item["text"])
            finish_reason = item["finish_reason"]
            if is_interrupted():
                break
    print()
    if finish_reason == "length":
        print("the answer ends here because of --max-tokens or --max-model-len", file=sys.stderr)
    return "".join(texts)


@contextlib.contextmanager
def _deferred_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C was pressed. The first time, nothing is raised.

    A KeyboardInterrupt in the middle of a step would close an engine of several ranks.
    """
    received = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = signal.signal(signal.SIGINT, receive)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, previous)
