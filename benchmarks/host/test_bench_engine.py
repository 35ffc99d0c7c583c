"""The host's part of whole decode steps, and of the admission of prompts: all of engine/, and no model.

test_bench_host.py has the parts. benchmarks/hosting.py says how they are compared.
"""

from collections.abc import Sequence as Sequences
from typing import Any, NamedTuple

import pytest

from benchmarks.shapes import draw_lens
from nanovllm import Config, SamplingParams
from nanovllm.bench.workload import MAX_TOKEN_ID, draw_requests
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.engine_core import EngineCore
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.model_input import prepare_decode, prepare_decode_async, prepare_prefill
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.executor.base import Executor, PendingTokens

NUM_SEQS = 256
PROMPT_LEN = 4000
BLOCK_SIZE = 256
MAX_MODEL_LEN = 200_000  # no sequence finishes while the time is taken
VOCAB_SIZE = MAX_TOKEN_ID + 1
ADMISSION_ROUNDS = 9  # of about 0.2 s
ADMISSION_YARDSTICKS = 1000  # of about 0.1 ms


class KnownTokens(NamedTuple):
    batch: ScheduledBatch

    def token_ids(self) -> list[int]:
        return [7] * len(self.batch.sampled_sequences)


class HostExecutor(Executor):
    """Prepares the integers of each step, and computes nothing of it."""

    num_kv_cache_blocks = NUM_SEQS * 500
    supports_async_scheduling = True
    is_closed = False

    def execute(self, batch: ScheduledBatch, previous: PendingTokens | None = None) -> KnownTokens:
        if previous is not None:
            prepare_decode_async(batch.sequences, previous.batch.sampled_sequences)
        else:
            (prepare_prefill if batch.is_prefill else prepare_decode)(batch.sequences)
        return KnownTokens(batch)

    def close(self) -> None:
        pass


class HostSide:
    """An engine without a model: InputProcessor, EngineCore and Scheduler, as LLMEngine connects them."""

    def __init__(self, async_scheduling: bool) -> None:
        config = Config("a model", max_num_seqs=NUM_SEQS, max_model_len=MAX_MODEL_LEN, kv_cache_block_size=BLOCK_SIZE)
        executor = HostExecutor()
        self.scheduler = Scheduler(
            BlockManager(executor.num_kv_cache_blocks, BLOCK_SIZE),
            max_num_seqs=NUM_SEQS,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
        )
        self.input_processor = InputProcessor(config, None, VOCAB_SIZE, self.scheduler.validate_request)
        self.core = EngineCore(self.scheduler, executor, async_scheduling)

    def add(self, prompts: Sequences[list[int]]) -> None:
        params = SamplingParams(max_tokens=MAX_MODEL_LEN, ignore_eos=True)
        for request in self.input_processor.make_requests(list(prompts), params):
            self.core.enqueue(request, self.core.requests.step_owner)

    def step(self) -> ScheduledBatch:
        return self.core.advance(self.core.requests.step_owner)

    def admit_all(self) -> None:
        """Step until all requests decode."""
        while self.scheduler.waiting or not all(seq.is_decodable for seq in self.scheduler.running):
            self.step()


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "waiting"])
def test_engine_decode_step(host: Any, async_scheduling: bool) -> None:
    """A decode step of 256 sequences, from the choice of the sequences to their new tokens."""
    side = HostSide(async_scheduling)
    side.add([[index, *range(length - 1)] for index, length in enumerate(draw_lens(NUM_SEQS, 100, 1800))])
    side.admit_all()
    assert host(side.step).num_scheduled_tokens == (1,) * NUM_SEQS


def test_admission_of_256_prompts_of_4000_tokens(host: Any) -> None:
    """Checks, queue, blocks and their hashes, and all steps of the prefill. No block is found in the cache."""
    prompts, _ = draw_requests(NUM_SEQS, (PROMPT_LEN, PROMPT_LEN), (1, 1), VOCAB_SIZE, seed=0)

    def admit(side: HostSide) -> HostSide:
        side.add(prompts)
        side.admit_all()
        return side

    side = host(
        admit,
        prepare=lambda: HostSide(async_scheduling=True),
        rounds=ADMISSION_ROUNDS,
        yardsticks_per_round=ADMISSION_YARDSTICKS,
    )
    assert len(side.scheduler.running) == NUM_SEQS
    assert side.scheduler.block_manager.num_hit_blocks == 0
