"""Reproducible sampling: the seed decides the text, whatever runs beside the request and however it is scheduled.

    python -m examples.reproducible_sampling [MODEL]

The random numbers are a function of the seed, the position and the token id, and no state is carried from one draw to
the next. So the text is the same alone, in a batch, and in an engine that computes prompts in chunks of two tokens and
two sequences at a time. (Logits are rounded differently in other shapes, which can in rare cases change a draw.)
"""

import sys

from nanovllm import LLM, SamplingParams, bundled_model_path

PROMPT = "A time to"
OTHERS = ["In the beginning", "The LORD is my shepherd", "Blessed are the meek"]
SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 2}
SEED, ANOTHER_SEED = 1, 2


def params(seed: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.9, max_tokens=32, seed=seed)


def main(model: str) -> None:
    with LLM(model) as llm:
        (alone,) = llm.generate(PROMPT, params(SEED), use_tqdm=False)
        batch = llm.generate(
            [*OTHERS, PROMPT, PROMPT], [params()] * 3 + [params(SEED), params(ANOTHER_SEED)], use_tqdm=False
        )
    with LLM(model, **SMALL) as llm:
        (*_, crowded) = llm.generate([*OTHERS, PROMPT], [params()] * 3 + [params(SEED)], use_tqdm=False)
    for name, output in {
        f"seed {SEED}, alone": alone,
        f"seed {SEED}, in a batch": batch[3],
        f"seed {SEED}, in a small engine": crowded,
        f"seed {ANOTHER_SEED}": batch[4],
    }.items():
        print(f"{name}: {output['text']!r}")
    is_same = alone["token_ids"] == batch[3]["token_ids"] == crowded["token_ids"]
    print(f"the three texts of seed {SEED} are the same" if is_same else f"THE TEXTS OF SEED {SEED} DIFFER")
    if not is_same:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(bundled_model_path()))
