"""One set of prompts, served in different ways: tokens and logits of each, to be compared."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_input import ModelInput
from nanovllm.engine.scheduler import ScheduledBatch

PARAMS = SamplingParams.greedy(max_tokens=10, ignore_eos=True)
PREFIX = [7, 3, 9, 9, 2, 11, 5, 3, 8, 1, 4, 4, 10, 6, 2, 7]
PROMPTS = [[*PREFIX, *end] for end in ([12, 5], [12, 5, 9, 1, 1], [30], [2] * 9)] + [[1], [5, 6, 7]]
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch",
    "max_model_len": 48,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "kv_cache_block_size": 16,
    "num_kv_cache_blocks": 40,
    "async_scheduling": False,  # on a GPU too: it is one of the ways
}


@dataclass(frozen=True)
class Served:
    """logits [num_tokens, V]: what each token was sampled from."""

    token_ids: list[int]
    logits: torch.Tensor


def serve(
    model_dir: Path,
    prompts: list[list[int]] = PROMPTS,
    times: int = 1,
    is_pickled: bool = False,
    after_step: Callable[[LLM, int], None] | None = None,
    happens: Callable[[LLM], int] | None = None,
    **options: Any,
) -> list[Served]:
    """The prompts, served together, in their order.

    times: the last one counts. after_step: called with the LLM and the number of steps so far. happens: how often
    that did without which this would not be the way of serving that it is meant to be.
    """
    with LLM(str(model_dir), **{**OPTIONS, **options}) as llm:
        for _ in range(times):
            tokens: dict[int, list[int]] = {}
            num_steps = 0
            with recorded(llm, is_pickled) as logits:
                seq_ids = [llm.add_request(prompt, PARAMS) for prompt in prompts]
                while not llm.is_finished():
                    tokens.update({output["seq_id"]: output["token_ids"] for output in llm.step().finished})
                    num_steps += 1
                    if after_step is not None:
                        after_step(llm, num_steps)
        assert happens is None or happens(llm) > 0, "what is to be compared did not happen"
    return [
        Served(tokens[seq_id], torch.stack([logits[seq_id, len(prompt) + i] for i in range(len(tokens[seq_id]))]))
        for seq_id, prompt in zip(seq_ids, prompts, strict=True)
    ]


@contextmanager
def recorded(llm: LLM, is_pickled: bool = False) -> Iterator[dict[tuple[int, int], torch.Tensor]]:
    """(seq_id, position) -> the logits, on the CPU, that the token at this position was sampled from.

    is_pickled: as a rank in another process has the batch.
    """
    runner: Any = llm._core.executor._runner
    logits: dict[tuple[int, int], torch.Tensor] = {}
    run, sampler, graphs = runner.run, runner.sampler, runner.graphs
    current: list[ScheduledBatch] = []

    def remember(rows: torch.Tensor, positions: Any) -> None:
        for seq, row, position in zip(current[0].sampled_sequences, rows, positions.tolist(), strict=True):
            logits[seq.seq_id, position] = row.cpu().clone()

    def remember_and_run(batch: ScheduledBatch, *previous: Any) -> Any:
        current[:] = [pickle.loads(pickle.dumps(batch)) if is_pickled and not previous else batch]
        output = run(current[0], *previous)
        output.batch = batch
        return output

    def sample(rows: torch.Tensor, params: Any) -> torch.Tensor:
        remember(rows, params.position)
        return sampler(rows, params)

    def replay(model_input: ModelInput, *previous: Any) -> Any:
        output = replay_graph(model_input, *previous)  # samples too
        remember(output[0], model_input.sampling.position)
        return output

    with ExitStack() as patches:
        patches.enter_context(mock.patch.multiple(runner, run=remember_and_run, sampler=sample))
        if graphs is not None:
            replay_graph = graphs.replay
            patches.enter_context(mock.patch.object(graphs, "replay", replay))
        yield logits
