"""Prefix caching made visible: a common beginning of several prompts is computed once.

    python -m examples.prefix_caching [MODEL]

Each prompt is generated alone, with one output token, so its time is the time to the first token. From the second
prompt on, the whole KV blocks of the beginning are found in the cache. `nanovllm trace` draws the same for your
prompts.
"""

import sys
import time

from nanovllm import LLM, SamplingParams, bundled_model_path

PASSAGE = "To every thing there is a season, and a time to every purpose under the heaven: "
SHARED = PASSAGE * 30
QUESTIONS = ["A time to", "In the beginning", "The LORD is", "A time to"]
PARAMS = SamplingParams.greedy(max_tokens=1)


def main(model: str) -> None:
    with LLM(model) as llm:
        llm.generate("Warm up", PARAMS, use_tqdm=False)
        num_shared = len(llm.tokenizer.encode(SHARED))
        block_size = llm.config.kv_cache_block_size
        print(f"{num_shared} tokens in common, {num_shared // block_size} full blocks of {block_size}")
        for question in QUESTIONS:
            start = time.perf_counter()
            (output,) = llm.generate(SHARED + question, PARAMS, use_tqdm=False)
            milliseconds = 1000 * (time.perf_counter() - start)
            print(f"{question!r:20} {output['num_cached_tokens']:5} tokens from the cache, {milliseconds:6.1f} ms")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(bundled_model_path()))
