"""One set of prompts, served in different ways: tokens and logits of each, to be compared."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Way:
    """How prompts are served, and the events that must occur so that they are served in this way.

    after_step: called with the LLM and the number of steps so far. happens: how often it did.
    """

    options: dict[str, Any] = field(default_factory=dict)
    is_alone: bool = False  # each prompt in an engine that has seen no other
    is_repeated: bool = False  # the second time is the one that counts
    is_pickled: bool = False
    after_step: Callable[[LLM, int], None] | None = None
    happens: Callable[[LLM], int] | None = None


def serve(model_dir: Path, way: Way, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Served]:
    """The prompts, served in this way, in their order."""
    groups = [[prompt] for prompt in prompts] if way.is_alone else [prompts]
    return [served for group in groups for served in _serve_together(model_dir, group, way, options)]


def _serve_together(model_dir: Path, prompts: list[list[int]], way: Way, options: dict[str, Any]) -> list[Served]:
    with LLM(str(model_dir), **{**OPTIONS, **options, **way.options}) as llm:
        for _ in range(1 + way.is_repeated):
            with recorded(llm, way.is_pickled) as logits:
                seq_ids, tokens = _run(llm, prompts, way)
        assert way.happens is None or way.happens(llm) > 0, "what is to be compared did not happen"
    return [
        Served(tokens[seq_id], torch.stack([logits[seq_id, len(prompt) + i] for i in range(len(tokens[seq_id]))]))
        for seq_id, prompt in zip(seq_ids, prompts, strict=True)
    ]


def _run(llm: LLM, prompts: list[list[int]], way: Way) -> tuple[list[int], dict[int, list[int]]]:
    """The prompts' seq_ids, in their order, and seq_id -> tokens."""
    seq_ids = [llm.add_request(prompt, PARAMS) for prompt in prompts]
    tokens: dict[int, list[int]] = {}
    num_steps = 0
    while not llm.is_finished():
        tokens.update({output["seq_id"]: output["token_ids"] for output in llm.step().finished})
        num_steps += 1
        if way.after_step is not None:
            way.after_step(llm, num_steps)
    return seq_ids, tokens


@contextmanager
def recorded(llm: LLM, is_pickled: bool = False) -> Iterator[dict[tuple[int, int], torch.Tensor]]:
    """(seq_id, position) -> the logits, on the CPU, that the token at this position was sampled from.

    is_pickled: the batch is pickled, as for a rank in another process.
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
