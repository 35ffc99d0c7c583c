"""Writes tests/replay/corpus: `python -m tests.replay.make_corpus`, for new traces or decisions changed on purpose.

Each trace is what the engine does now, so look at `git diff` before a changed one is committed: every line of it is a
change in behaviour.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanovllm import SamplingParams, bundled_model_path
from nanovllm.engine.scheduler import Scheduler
from tests.replay import recorder
from tests.replay.trace import Trace
from tests.unit.engine.harness import add_prompt, make_scheduler, make_sequence, next_token, run, step

CORPUS = Path(__file__).with_name("corpus")
PREFIX = [7, 3, 9, 9, 2, 11, 5, 3, 8, 1, 4, 4]
ALL_FILTERS = [
    SamplingParams.greedy(max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=1.3, seed=5, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=0.7, top_k=8, seed=2**63 + 1, max_tokens=8, ignore_eos=True),
    SamplingParams(top_p=0.8, seed=6, max_tokens=8, stop_token_ids=[17]),
    SamplingParams(temperature=2.0, min_p=0.05, seed=7, max_tokens=8),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, max_tokens=8),
]


# --- schedulers ---


def preemption() -> Scheduler:
    """Four sequences outgrow nine blocks of two."""
    scheduler = make_scheduler(9, 2, max_num_seqs=4)
    for seq_id in range(4):
        add_prompt(scheduler, 3, seq_id, max_tokens=9)
    run(scheduler)
    return scheduler


def chunked_prefill() -> Scheduler:
    """Prompts of 3 to 23 tokens, five tokens a step; the first decodes between the others' chunks."""
    scheduler = make_scheduler(32, 4, max_num_seqs=3, max_num_batched_tokens=5)
    for seq_id, num_tokens in enumerate((3, 23, 11, 17)):
        add_prompt(scheduler, num_tokens, seq_id, max_tokens=4)
    run(scheduler)
    return scheduler


def prefix_hits() -> Scheduler:
    """Whole prompts, whole blocks and parts of blocks again: alongside, afterwards, and twice in one step."""
    scheduler = make_scheduler(24, 4)
    for seq_id, (tokens, num_steps) in enumerate([(PREFIX, 2), (PREFIX, 0), (PREFIX, 1), (PREFIX[:9], 9), (PREFIX, 0)]):
        scheduler.add(make_sequence(tokens, seq_id=seq_id, max_tokens=5))
        for _ in range(num_steps):
            step(scheduler)
    run(scheduler)
    return scheduler


def eviction() -> Scheduler:
    """Prompts one after the other through six blocks, the first of them again at the end."""
    scheduler = make_scheduler(6, 2, max_num_seqs=2)
    for seq_id, start in enumerate((0, 20, 40, 0, 60, 20, 0)):
        scheduler.add(make_sequence(list(range(start, start + 7)), 2, seq_id=seq_id, max_tokens=3))
        step(scheduler)
    run(scheduler)
    return scheduler


def collision() -> Scheduler:
    """A hash of three values, so that nearly all blocks collide."""
    scheduler = make_scheduler(10, 2, max_num_seqs=3, hash_function=lambda tokens, parent: sum(tokens) % 3)
    rng = random.Random(1)
    for seq_id in range(8):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(3, 8))]
        scheduler.add(make_sequence(tokens, 2, seq_id=seq_id, max_tokens=4))
        step(scheduler)
    run(scheduler)
    return scheduler


def abort_in_mid_step() -> Scheduler:
    """Between schedule() and postprocess(), of a prefilling and of a decoding sequence; one waits; one is unknown."""
    scheduler = make_scheduler(12, 2, max_num_seqs=3, max_num_batched_tokens=6)
    for seq_id in range(4):
        add_prompt(scheduler, 5, seq_id, max_tokens=6)
    for aborted in ([1], [], [0, 3], [], [99]):
        batch = scheduler.schedule()
        for seq_id in aborted:
            scheduler.abort(seq_id)
        scheduler.postprocess(batch, [next_token(seq) for seq in batch.sampled_sequences])
    run(scheduler)
    return scheduler


# --- engines ---


def engine_trace(model: str, requests: list[tuple[Any, SamplingParams]], **options: Any) -> Trace:
    """Two requests arrive at each step; the second one is aborted after the fourth step."""
    from nanovllm import LLM

    options = {"device": "cpu", "attention_backend": "torch", **options}
    with LLM(model, **options) as llm:
        pending, num_steps = list(requests), 0
        while pending or not llm.is_finished():
            for prompt, params in pending[:2]:
                llm.add_request(prompt, params)
            pending = pending[2:]
            llm.step()
            num_steps += 1
            if num_steps == 4:
                llm.abort(1)
        return recorder.recording_of(llm.scheduler).trace()


def tiny_trace(architecture: str) -> Trace:
    """Ten requests with every filter, a shared prefix, chunks, preemptions and evictions, in blocks of two tokens."""
    from tests.tiny_models import tiny_model

    prompts = [[*PREFIX[: 3 + 3 * (number % 4)], number] for number in range(10)]
    return engine_trace(
        str(tiny_model(architecture)),
        [(prompt, ALL_FILTERS[number % len(ALL_FILTERS)]) for number, prompt in enumerate(prompts)],
        dtype="float32",
        max_model_len=40,
        kv_cache_block_size=2,
        num_kv_cache_blocks=16,
        max_num_seqs=4,
        max_num_batched_tokens=9,
    )


def bundled_trace() -> Trace:
    """The bundled model, with a stop string, blocks of 16 (a GPU's kernels take those) and no room for all at once."""
    prompts = ["In the beginning", "The LORD is my shepherd", "And God said, Let there be", "To every thing there is a"]
    params = [SamplingParams.greedy(max_tokens=40, ignore_eos=True), SamplingParams(seed=3, temperature=0.8)]
    params += [
        SamplingParams.greedy(max_tokens=40, stop="darkness"),
        SamplingParams(top_p=0.9, seed=1, max_tokens=40, ignore_eos=True),
    ]
    return engine_trace(
        str(bundled_model_path()),
        list(zip(prompts, params, strict=True)),
        dtype="float32",
        max_model_len=64,
        kv_cache_block_size=16,
        num_kv_cache_blocks=5,
        max_num_seqs=3,
        max_num_batched_tokens=16,
    )


SCHEDULERS = [preemption, chunked_prefill, prefix_hits, eviction, collision, abort_in_mid_step]
TRACES: dict[str, Callable[[], Trace]] = {
    **{make.__name__: lambda make=make: recorder.recording_of(make()).trace() for make in SCHEDULERS},
    **{f"engine_{name}": lambda name=name: tiny_trace(name) for name in ("llama", "qwen2", "qwen3", "qwen3_moe")},
    "engine_bundled": bundled_trace,
}


def main() -> None:
    recorder.install()
    for name, make in TRACES.items():
        trace = make()
        trace.save(CORPUS / f"{name}.jsonl")
        print(f"{name}: {len(trace.events)} events")


if __name__ == "__main__":
    main()
