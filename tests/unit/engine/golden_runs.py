"""The runs whose decisions are kept in golden/: `python -m tests.unit.engine.golden_runs` writes them anew.

Do so when decisions change on purpose, and read `git diff` before the commit: each line of it is a change in behaviour.
"""

from collections.abc import Callable
from pathlib import Path

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.engine.scheduler import Scheduler
from tests.support.replay.trace import Trace, recording
from tests.support.scheduling import add_prompt, make_scheduler, make_sequence, next_token, run

GOLDEN = Path(__file__).with_name("golden")
PREFIX = [7, 3, 9, 9, 2, 11, 5, 3, 8, 1, 4, 4]


def preemption(scheduler: Scheduler) -> None:
    """Three sequences outgrow six blocks of two."""
    for seq_id in range(3):
        add_prompt(scheduler, 3, seq_id, max_tokens=6)
    run(scheduler)


def crowd(scheduler: Scheduler) -> None:
    """Chunks, whole and partial hits, evictions, and aborts of a running and a waiting sequence during a step."""
    aborted = {3: [2], 5: [5, 99]}
    for seq_id, tokens in enumerate([PREFIX, PREFIX[:9], [*range(20, 27)], PREFIX, [*range(40, 47)], PREFIX]):
        scheduler.add(make_sequence(tokens, 2, seq_id=seq_id, max_tokens=3))
        batch = scheduler.schedule()
        for number in aborted.get(seq_id, []):
            scheduler.abort(number)
        scheduler.postprocess(batch, [next_token(seq) for seq in batch.sampled_sequences])
    run(scheduler)


RUNS: dict[Callable[[Scheduler], None], Callable[[], Scheduler]] = {
    preemption: lambda: make_scheduler(6, 2, max_num_seqs=4),
    crowd: lambda: make_scheduler(10, 2, max_num_seqs=3, max_num_batched_tokens=8),
}


def engine() -> Trace:
    """The bundled model: every filter, a stop string, and five blocks of 16 (the triton backend takes those)."""
    prompts = [
        "In the beginning God created",
        "The LORD is my shepherd;",
        "To every thing there is a season",
        "And God said, Let there be",
    ]
    params = [
        SamplingParams.greedy(max_tokens=24, ignore_eos=True),
        SamplingParams(top_p=0.9, seed=1, max_tokens=24, ignore_eos=True),
        SamplingParams(seed=3, temperature=0.8, top_k=20, min_p=0.02, max_tokens=5),
        SamplingParams.greedy(max_tokens=5, stop="light"),
    ]
    with LLM(
        str(bundled_model_path()), device="cpu", attention_backend="torch", dtype="float32", max_model_len=64,
        kv_cache_block_size=16, num_kv_cache_blocks=5, max_num_seqs=3, max_num_batched_tokens=16,
    ) as llm, recording(llm) as trace:  # fmt: skip
        ids = [llm.add_request(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
        for _ in range(3):
            llm.step()
        llm.abort(ids[2])
        while not llm.is_finished():
            llm.step()
    return trace


def main() -> None:
    for play, make in RUNS.items():
        scheduler = make()
        with recording(scheduler) as trace:
            play(scheduler)
        trace.save(GOLDEN / f"{play.__name__}.jsonl")
    engine().save(GOLDEN / "engine.jsonl")


if __name__ == "__main__":
    main()
