"""nanovllm generate: continue one prompt or many."""

import argparse
import json
from typing import Any

from nanovllm.commands.options import add_command, add_generation_options, open_generation


def add_parser(commands: Any) -> None:
    generate = add_command(commands, "generate", run, "continue one prompt or many", " PROMPT [PROMPT ...]")
    add_generation_options(generate)
    generate.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line for each prompt: prompt, text, token_ids, finish_reason and more, in ASCII",
    )


def run(arguments: argparse.Namespace) -> int:
    with open_generation(arguments) as (llm, prompts, inputs, params):
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
