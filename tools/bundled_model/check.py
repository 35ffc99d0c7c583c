"""Prints what a trained model does with the demo prompts, through transformers: continuations and top-1 margins.

    python -m tools.bundled_model.check [--model DIR]    (from the repository's root)

A margin is the best logit less the second best. It is measured in float32 at every token of the greedy continuation,
its end-of-text token included.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm.assets import bundled_model_path
from nanovllm.demo_prompts import DEMO_PROMPTS


class Continuation(NamedTuple):
    """What a model makes of one prompt, greedily."""

    text: str  # without the end-of-text token
    ended: bool  # by the end-of-text token
    margins: Tensor  # [num_tokens], float32


def greedy_continuations(model_path: Path, prompts: Sequence[str], num_tokens: int) -> list[Continuation]:
    """Continues the prompts by up to num_tokens, in one left-padded batch, with transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=num_tokens, return_dict_in_generate=True, output_logits=True
    )
    best, second = torch.stack(output.logits, dim=1).topk(2).values.unbind(-1)
    continuations = []
    for token_ids, margins in zip(
        output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), best - second, strict=True
    ):
        ended = tokenizer.eos_token_id in token_ids
        length = token_ids.index(tokenizer.eos_token_id) if ended else len(token_ids)
        continuations.append(Continuation(tokenizer.decode(token_ids[:length]), ended, margins[: length + ended]))
    return continuations


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the demo prompts' continuations and their top-1 margins.")
    parser.add_argument("--model", type=Path, help="a checkpoint's directory (default: the bundled model)")
    parser.add_argument("--num-tokens", type=int, default=64, help="of each continuation (default: %(default)s)")
    arguments = parser.parse_args()

    continuations = greedy_continuations(arguments.model or bundled_model_path(), DEMO_PROMPTS, arguments.num_tokens)
    for prompt, (text, ended, margins) in zip(DEMO_PROMPTS, continuations, strict=True):
        print(f"{margins.min():6.2f}  [{prompt}]{' '.join(text.split(chr(10)))}{' (end)' if ended else ''}")
    margins = torch.cat([continuation.margins for continuation in continuations])
    print(
        f"margins of {len(margins)} tokens: least {margins.min():.3f}, 1st percentile {margins.quantile(0.01):.2f}, ",
        end="",
    )
    print(f"median {margins.median():.2f}")


if __name__ == "__main__":
    main()
