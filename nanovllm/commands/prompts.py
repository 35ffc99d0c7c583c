"""What the commands that generate share: the prompts, the options of sampling, and the chat template."""

import argparse
from typing import Any

from nanovllm.commands.options import add_model_options, add_sampling_options
from nanovllm.console import read_lines_from_stdin
from nanovllm.engine.chat import chat_prompts
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
    add_sampling_options(command)
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
