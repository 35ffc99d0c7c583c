"""nanovllm demo: streaming, a batch and seeds on the bundled model; then compares the outputs with transformers."""

import argparse
from pathlib import Path
from typing import Any

from nanovllm import LLM, LLMEngine, RequestOutput, SamplingParams, bundled_model_path
from nanovllm.commands.options import add_command
from nanovllm.demo_prompts import DEMO_PROMPTS

NUM_STREAMED = 3
GREEDY = SamplingParams.greedy(max_tokens=64)
SAMPLED_PROMPT = "A time to"  # the model knows many continuations, so the outputs of two seeds differ
TEMPERATURE = 0.8
SEEDS = (1, 2)


def add_parser(commands: Any) -> None:
    add_command(commands, "demo", run, "what the engine does, in a minute, without a GPU or a download")


def run(arguments: argparse.Namespace) -> int:
    """Print the demo. Returns 1 if an output differs from transformers', or if one seed gave two texts; otherwise 0."""
    path = bundled_model_path()
    print("The bundled model: a tiny Qwen3 that knows passages of the King James Bible by heart. CPU, float32.")
    with LLM(str(path), device="cpu", dtype="float32") as llm:
        _heading(f"1. {NUM_STREAMED} prompts, streamed as the tokens are produced")
        for prompt in DEMO_PROMPTS[:NUM_STREAMED]:
            print(f"[{prompt}]", end="", flush=True)
            for item in llm.generate_stream(prompt, GREEDY):
                print(item["text"].replace("\n", " "), end="", flush=True)
            print(flush=True)

        _heading(f"2. {len(DEMO_PROMPTS)} prompts at once")
        outputs = llm.generate(list(DEMO_PROMPTS), GREEDY)
        for prompt, output in zip(DEMO_PROMPTS[NUM_STREAMED:][:NUM_STREAMED], outputs[NUM_STREAMED:], strict=False):
            _show(prompt, output["text"])
        print(f"... and {len(DEMO_PROMPTS) - NUM_STREAMED} more")

        _heading(f"3. Sampled at temperature {TEMPERATURE}: the seed decides, whatever runs beside it")
        is_reproducible = _show_seeds(llm, SAMPLED_PROMPT)

    _heading("4. The greedy outputs of 2. against transformers")
    is_equal = _compare(path, outputs)
    return 0 if is_equal and is_reproducible else 1


def _heading(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def _show(prompt: str, text: str, label: str = "") -> None:
    print(f"{label}[{prompt}]{text}".replace("\n", " "))


def _show_seeds(llm: LLMEngine, prompt: str) -> bool:
    """Generate with all seeds in one batch, then with the first alone. Returns whether its two outputs are equal."""
    params = [SamplingParams(temperature=TEMPERATURE, max_tokens=GREEDY.max_tokens, seed=seed) for seed in SEEDS]
    outputs = llm.generate([prompt] * len(SEEDS), params, use_tqdm=False)
    for seed, output in zip(SEEDS, outputs, strict=True):
        _show(prompt, output["text"], label=f"seed {seed}: ")
    (alone,) = llm.generate(prompt, params[0], use_tqdm=False)
    is_same = alone["token_ids"] == outputs[0]["token_ids"]
    print(f"seed {SEEDS[0]} once more, alone: {'the same text' if is_same else 'ANOTHER TEXT: ' + alone['text']}")
    return is_same


def _compare(path: Path, outputs: list[RequestOutput]) -> bool:
    """Print which outputs differ from transformers' generate and how many are equal. Returns whether all are."""
    print("loading transformers ...", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    num_equal = 0
    for prompt, output in zip(DEMO_PROMPTS, outputs, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            (expected,) = model.generate(**inputs, do_sample=False, max_new_tokens=GREEDY.max_tokens).tolist()
        expected = expected[inputs["input_ids"].shape[1] :]
        num_equal += expected == output["token_ids"]
        if expected != output["token_ids"]:
            print(f"differs: [{prompt}]\n  nanovllm     {output['token_ids']}\n  transformers {expected}")
    total = len(DEMO_PROMPTS)
    print(f"{num_equal} of {total} outputs are token for token those of transformers' own generate on the same weights")
    return num_equal == total
