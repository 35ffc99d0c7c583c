"""nanovllm generate: continue one prompt or many."""

import argparse
import json
from typing import Any

from nanovllm.commands.options import (
    add_command,
    add_model_options,
    add_sampling_options,
    open_llm,
    sampling_params,
)
from nanovllm.console import read_lines_from_stdin
from nanovllm.engine.chat import chat_prompts
from nanovllm.validation import require_unicode


def add_parser(commands: Any) -> None:
    generate = add_command(commands, "generate", run, "continue one prompt or many", " PROMPT [PROMPT ...]")
    generate.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help='text to continue; "-" reads prompts from standard input, one a line',
    )
    add_model_options(generate)
    add_sampling_options(generate)
    generate.add_argument("--chat", action="store_true", help="apply the model's chat template to each prompt")
    generate.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line for each prompt: prompt, text, token_ids, finish_reason and more, in ASCII",
    )


def run(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    prompts = _read_prompts(arguments.prompts)
    with open_llm(arguments) as llm:
        if llm.tokenizer is None:
            raise ValueError(
                f"model must have a tokenizer to read prompts, got {arguments.model!r}; add tokenizer.json"
            )
        inputs = [_as_chat(llm, prompt) for prompt in prompts] if arguments.chat else prompts
        if len(prompts) == 1 and not arguments.json:
            for item in llm.generate_stream(inputs, params):
                print(item["text"], end="", flush=True)
            print()
            return 0
        outputs = llm.generate(inputs, params, use_tqdm=not arguments.json)
    for prompt, output in zip(prompts, outputs, strict=True):
        if arguments.json:
            print(json.dumps({"prompt": prompt, **output}))  # ASCII, which every encoding has
        else:
            print(f"\n>>> {prompt}\n{output['text']}")
    return 0


def _read_prompts(prompts: list[str]) -> list[str]:
    """The prompts of the command line; "-" stands for the lines of standard input, blank ones left out."""
    read = []
    for prompt in prompts:
        if prompt != "-":
            require_unicode("a prompt", prompt)
            read.append(prompt)
        else:
            read.extend(read_lines_from_stdin())
    return read


def _as_chat(llm: Any, prompt: str) -> list[int]:
    """Token ids of a conversation that consists of the user's `prompt`, up to where the answer begins."""
    if not getattr(llm.tokenizer, "chat_template", None):
        raise ValueError("--chat needs a model with a chat template, and this one has none: leave out --chat")
    (token_ids,) = chat_prompts(llm.tokenizer, [{"role": "user", "content": prompt}])
    return token_ids
