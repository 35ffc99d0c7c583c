"""Throughput of the engine on random prompts, drawn as nano-vllm's bench.py draws them."""

import random
import time
from typing import TYPE_CHECKING

from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import require_int

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

TEMPERATURE = 0.6
MAX_TOKEN_ID = 10000  # ids are drawn from 0 to this, or from the vocabulary where that is smaller


def draw_requests(
    num_seqs: int, input_len: tuple[int, int], output_len: tuple[int, int], vocab_size: int, seed: int
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of random token ids, and parameters that generate exactly the drawn number of tokens.

    Both ranges hold their ends. Raises ValueError for an empty range or a length below 1.
    """
    require_int("num_seqs", num_seqs, 1)
    for name, (low, high) in (("input_len", input_len), ("output_len", output_len)):
        require_int(f"{name}'s minimum", low, 1)
        require_int(f"{name}'s maximum", high, low, remedy="MIN comes before MAX")
    rng = random.Random(seed)
    top = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(rng.randint(*input_len))] for _ in range(num_seqs)]
    params = [
        SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=rng.randint(*output_len))
        for _ in range(num_seqs)
    ]
    return prompts, params


def run_bench(
    llm: "LLMEngine", num_seqs: int, input_len: tuple[int, int], output_len: tuple[int, int], seed: int
) -> None:
    """Generate once to warm up, then time one generate() of all requests and print what it did."""
    max_model_len = llm.config.max_model_len
    require_int(
        "input_len's maximum",
        input_len[1],
        1,
        max_model_len - 1,
        remedy=f"lower it: a prompt leaves room for one generated token, and sequences have {max_model_len} at most",
    )
    prompts, params = draw_requests(num_seqs, input_len, output_len, llm.vocab_size, seed)
    llm.generate([[1]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    num_input = sum(map(len, prompts))
    num_output = sum(len(output["token_ids"]) for output in outputs)
    with_prompts = (num_input + num_output) / seconds
    print(f"{num_seqs} requests, {num_input} prompt tokens, {num_output} generated tokens in {seconds:.2f} s")
    print(f"throughput: {num_output / seconds:.1f} generated tok/s ({with_prompts:.1f} with the prompts counted in)")
    print("One run, prefill and decode together, every request present from the start, random prompts without common")
    print("prefixes. Runs scatter: compare several before you conclude anything.")
