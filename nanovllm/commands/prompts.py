"""What the commands that generate share: the prompts, the options of sampling, and the chat template."""

import argparse
from typing import Any

from nanovllm.commands.options import SAMPLING_HELP, add_model_options, add_options
from nanovllm.console import read_lines_from_stdin
from nanovllm.engine.chat import chat_prompts
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import require_unicode


def add_generation_options(command: argparse.ArgumentParser) -> None:
    """The prompts, and the options of the model, of sampling and of the chat template."""
    command.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help='text to continue; "-" reads prompts from standard input, one a line',
    )
    add_model_options(command)
    sampling = command.add_argument_group("sampling")
    sampling.add_argument("--greedy", action="store_true", help="take the most likely token at every step")
    add_options(sampling, SamplingParams, SAMPLING_HELP)
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-sequence token")
    command.add_argument("--chat", action="store_true", help="apply the model's chat template to each prompt")


def read_prompts(prompts: list[str]) -> list[str]:
    """The prompts of the command line; "-" stands for the lines of standard input, blank ones left out."""
    read = []
    for prompt in prompts:
        if prompt != "-":
            require_unicode("a prompt", prompt)
            read.append(prompt)
        else:
            read.extend(read_lines_from_stdin())
    return read


def model_inputs(llm: Any, prompts: list[str], arguments: argparse.Namespace) -> list[Any]:
    """What LLM.generate gets for `prompts`: with --chat, the token ids of a conversation of one message each."""
    if llm.tokenizer is None:
        raise ValueError(f"model must have a tokenizer to read prompts, got {arguments.model!r}; add tokenizer.json")
    return [_as_chat(llm, prompt) for prompt in prompts] if arguments.chat else prompts


def _as_chat(llm: Any, prompt: str) -> list[int]:
    """Token ids of a conversation that consists of the user's `prompt`, up to where the answer begins."""
    if not getattr(llm.tokenizer, "chat_template", None):
        raise ValueError("--chat needs a model with a chat template, and this one has none: leave out --chat")
    (token_ids,) = chat_prompts(llm.tokenizer, [{"role": "user", "content": prompt}])
    return token_ids
