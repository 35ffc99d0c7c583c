"""`nanovllm bench` without a scenario: the throughput of one generate() call."""

import time
from typing import TYPE_CHECKING

from nanovllm.bench.workload import draw_requests
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import require_int

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine


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
