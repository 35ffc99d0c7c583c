"""Tensor parallelism: two processes, each with half of every weight matrix, generate the same tokens as one.

    python -m examples.tensor_parallel [MODEL]

With two GPUs each process has one, and they communicate over NCCL; otherwise both compute on the CPU and communicate
over gloo. The other process imports this file, so the program must start below `if __name__ == "__main__":`.
"""

import sys

from nanovllm import LLM, SamplingParams, bundled_model_path

PROMPTS = ["In the beginning", "The LORD is my shepherd"]
PARAMS = SamplingParams.greedy(max_tokens=32)


def main(model: str) -> None:
    texts = {}
    for size in (1, 2):
        with LLM(model, tensor_parallel_size=size) as llm:
            texts[size] = [output["text"] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        print(f"{size} rank{'s' * (size > 1)}:")
        for prompt, text in zip(PROMPTS, texts[size], strict=True):
            print(f"  [{prompt}]{text}")
    print("the same texts" if texts[1] == texts[2] else "other texts: sums over two halves are rounded differently")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(bundled_model_path()))
