"""The runs whose decisions are kept in golden/: `python -m tests.unit.engine.golden_runs` writes them anew.

Do so when decisions change on purpose, and read `git diff` before the commit: each line of it is a change in behaviour.
"""

from collections.abc import Callable
from pathlib import Path

from nanovllm import LLM, SamplingParams, bundled_model_path
from nanovllm.engine.scheduler import Scheduler
from tests.support.replay.trace import Trace, recording
from tests.support.scheduling import add_prompt, make_scheduler, make_sequence, next_token, run, step

GOLDEN = Path(__file__).with_name("golden")
PREFIX = [7, 3, 9, 9, 2, 11, 5, 3, 8, 1, 4, 4]


def preemption(scheduler: Scheduler) -> None:
    """Four sequences outgrow nine blocks of two."""
    for seq_id in range(4):
        add_prompt(scheduler, 3, seq_id, max_tokens=9)
    run(scheduler)


def prefill_chunk(scheduler: Scheduler) -> None:
    """Prompts of 3 to 23 tokens, five tokens a step; the first decodes between the others' chunks."""
    for seq_id, num_tokens in enumerate((3, 23, 11, 17)):
        add_prompt(scheduler, num_tokens, seq_id, max_tokens=4)
    run(scheduler)


def block_hit(scheduler: Scheduler) -> None:
    """Whole prompts, whole blocks and parts of blocks again: beside each other, afterwards, and twice in one step."""
    for seq_id, (tokens, num_steps) in enumerate([(PREFIX, 2), (PREFIX, 0), (PREFIX, 1), (PREFIX[:9], 9), (PREFIX, 0)]):
        scheduler.add(make_sequence(tokens, seq_id=seq_id, max_tokens=5))
        for _ in range(num_steps):
            step(scheduler)
    run(scheduler)


def block_evicted(scheduler: Scheduler) -> None:
    """Prompts one after the other through six blocks, the first of them again at the end."""
    for seq_id, start in enumerate((0, 20, 40, 0, 60, 20, 0)):
        scheduler.add(make_sequence(list(range(start, start + 7)), 2, seq_id=seq_id, max_tokens=3))
        step(scheduler)
    run(scheduler)


def abort(scheduler: Scheduler) -> None:
    """Between schedule() and postprocess(), of a prefilling and a decoding sequence; one waits; one is unknown."""
    for seq_id in range(4):
        add_prompt(scheduler, 5, seq_id, max_tokens=6)
    for aborted in ([1], [], [0, 3], [], [99]):
        batch = scheduler.schedule()
        for seq_id in aborted:
            scheduler.abort(seq_id)
        scheduler.postprocess(batch, [next_token(seq) for seq in batch.sampled_sequences])
    run(scheduler)


RUNS: dict[Callable[[Scheduler], None], Callable[[], Scheduler]] = {
    preemption: lambda: make_scheduler(9, 2, max_num_seqs=4),
    prefill_chunk: lambda: make_scheduler(32, 4, max_num_seqs=3, max_num_batched_tokens=5),
    block_hit: lambda: make_scheduler(24, 4),
    block_evicted: lambda: make_scheduler(6, 2, max_num_seqs=2),
    abort: lambda: make_scheduler(12, 2, max_num_seqs=3, max_num_batched_tokens=6),
}


def engine() -> Trace:
    """The bundled model: every filter, a stop string, and five blocks of 16 (the triton backend takes those)."""
    prompts = ["In the beginning", "The LORD is my shepherd", "And God said, Let there be", "To every thing there is a"]
    params = [
        SamplingParams.greedy(max_tokens=40, ignore_eos=True),
        SamplingParams(seed=3, temperature=0.8, top_k=20, min_p=0.02),
        SamplingParams.greedy(max_tokens=40, stop="darkness"),
        SamplingParams(top_p=0.9, seed=1, max_tokens=40, ignore_eos=True),
    ]
    with LLM(
        str(bundled_model_path()), device="cpu", attention_backend="torch", dtype="float32", max_model_len=64,
        kv_cache_block_size=16, num_kv_cache_blocks=5, max_num_seqs=3, max_num_batched_tokens=16,
    ) as llm, recording(llm) as trace:  # fmt: skip
        ids = [llm.add_request(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
        for _ in range(4):
            llm.step()
        llm.abort(ids[1])
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
