"""A program like nano-vllm's example and benchmark, with only classes, methods and options that nano-vllm has.

`python nano_vllm_program.py DIRECTORY`, where the model is
"""

import sys
import time
from random import Random

from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams


def example(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)
    questions = ["In the beginning", "The LORD is my shepherd"]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=16))
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}")


def bench(path):
    random = Random(0)
    llm = LLM(
        path,
        max_num_batched_tokens=1024,
        max_num_seqs=16,
        max_model_len=512,
        gpu_memory_utilization=0.9,
        tensor_parallel_size=1,
        enforce_eager=False,
        kvcache_block_size=256,
        num_kvcache_blocks=-1,
    )
    vocab_size = len(llm.tokenizer)
    prompts = [[random.randrange(vocab_size) for _ in range(random.randint(20, 100))] for _ in range(24)]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=random.randint(4, 12)) for _ in range(len(prompts))
    ]
    llm.generate(["Benchmark: "], SamplingParams())
    start = time.time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.time() - start
    num_tokens = sum(param.max_tokens for param in params)
    assert [len(output["token_ids"]) for output in outputs] == [param.max_tokens for param in params]
    print(f"Total: {num_tokens}tok, Time: {seconds:.2f}s, Throughput: {num_tokens / seconds:.2f}tok/s")


if __name__ == "__main__":
    example(sys.argv[1])
    bench(sys.argv[1])
