"""Offline batch: many prompts in one call, each with its own parameters; prints one JSON object a line, in order.

    python -m examples.offline_batch [MODEL] > outputs.jsonl

Pass all prompts in one call: the engine fills each step from all requests that it has.
"""

import json
import sys

from nanovllm import LLM, SamplingParams, bundled_model_path

REQUESTS = [
    ("In the beginning", SamplingParams.greedy(max_tokens=24)),
    ("The LORD is my shepherd", SamplingParams.greedy(max_tokens=64, stop=".")),
    ("To every thing there is", SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=1)),
    ("Blessed are the meek", SamplingParams(temperature=0.8, max_tokens=8, seed=2)),
]


def main(model: str) -> None:
    prompts = [prompt for prompt, _ in REQUESTS]
    with LLM(model) as llm:
        outputs = llm.generate(prompts, [params for _, params in REQUESTS])
    for prompt, output in zip(prompts, outputs, strict=True):
        row = {"prompt": prompt, "text": output["text"], "finish_reason": output["finish_reason"]}
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(bundled_model_path()))
