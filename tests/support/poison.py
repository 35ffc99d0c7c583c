"""Poison: an LLM whose KV cache holds NaN wherever nothing may be read, so that a stale read fails at its step.

    with poisoned_llm(model_dir, **options) as llm: ...

A block may be read as long as a sequence owns it, or may still hit it in the prefix cache. So it is filled with NaN

    before the first step                               nothing was written yet
    when it is freed and is not in the prefix cache     finish, abort and preemption alike
    when it is taken for new tokens                     its content, cached or not, is lost then

A freed block that stays in the prefix cache keeps its keys until another sequence takes it, so a hit is no stale read.
Furthermore, torch.empty and similar functions give NaN, or integers that are no token, slot or block. The padding of
block tables, and the rows that pad a CUDA graph's batch, name a block of NaN, if one is free.

A computed row that is NaN raises PoisonError, which names the step, the sequence and its blocks. Poison wraps
methods of one LLM, and observes the first rank only.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from nanovllm import LLM
from nanovllm.engine.model_input import PADDING_BLOCK, ModelInput
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.worker import model_runner
from nanovllm.worker.async_output import AsyncModelOutput
from tests.support.counts import count_comparisons, count_event
from tests.support.kernels.guards import ALLOCATIONS


class PoisonError(AssertionError):
    """A step read a value that was never written, or is no longer valid."""


class PoisonedEmpty(TorchFunctionMode):
    """While it is active, uninitialised tensors hold NaN, integers the largest of their type, bools True."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = func(*args, **(kwargs or {}))
        if func not in ALLOCATIONS:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """While it is active, ModelRunners compute under PoisonedEmpty. They remove the function modes around them."""
    plain = model_runner.plain_torch_state

    @contextmanager
    def poisoned(*args: Any, **kwargs: Any) -> Iterator[None]:
        with plain(*args, **kwargs), PoisonedEmpty():
            yield

    with mock.patch.object(model_runner, "plain_torch_state", poisoned):
        yield


@contextmanager
def poisoned_llm(model_dir: str | Path, **options: Any) -> Iterator[LLM]:
    """An LLM under Poison from its construction on: weights that were not loaded are NaN, too."""
    with poisoned_empty():
        llm = LLM(str(model_dir), **options)
    with llm, ExitStack() as stack:
        Poison(llm, stack)
        yield llm


class Poison:
    """The instrument around one LLM, until `stack` is closed. Steps are counted from 1."""

    def __init__(self, llm: LLM, stack: ExitStack) -> None:
        self._llm = llm
        self._manager = llm.scheduler.block_manager
        self._runner: Any = llm._core.executor._runner
        self._batch: ScheduledBatch | None = None  # of the running step
        self._num_steps = 0
        self._runner.kv_cache.fill_(torch.nan)
        wrappers: list[tuple[Any, str, Callable[..., Any]]] = [
            (self._manager, "allocate", self._allocate),
            (self._manager, "append_block", self._open_block),
            (self._manager, "deallocate", self._deallocate),
            (self._runner, "run", self._step),
            (self._runner, "run_model", self._run_model),
        ]
        if self._runner.graphs is not None:
            wrappers.append((self._runner.graphs, "replay", self._replay))
        if self._runner.prefill_graphs is not None:
            wrappers.append((self._runner.prefill_graphs, "replay", self._replay_prefill))
        for owner, name, wrapper in wrappers:
            stack.enter_context(mock.patch.object(owner, name, partial(wrapper, getattr(owner, name))))

    # --- what is poisoned, and when ---

    def _fill(self, block_ids: list[int]) -> None:
        self._runner.kv_cache[:, :, block_ids] = torch.nan
        count_event("block poisoned", len(block_ids))

    def _allocate(self, allocate: Callable[..., None], seq: Sequence) -> None:
        allocate(seq)
        self._fill(seq.block_table[seq.num_tokens_with_kv // seq.block_size :])

    def _open_block(self, append_block: Callable[..., None], seq: Sequence) -> None:
        append_block(seq)
        self._fill(seq.block_table[-1:])

    def _deallocate(self, deallocate: Callable[..., None], seq: Sequence) -> None:
        table = list(seq.block_table)
        deallocate(seq)
        self._fill([block_id for block_id in table if self._is_free(block_id)])

    def _is_free(self, block_id: int) -> bool:
        """Whether nothing may read the block."""
        block = self._manager.blocks[block_id]
        return block.ref_count == 0 and not block.is_cached

    def _block_of_nan(self) -> int:
        """A block of NaN that padding can name; PADDING_BLOCK when there is none."""
        return next(filter(self._is_free, range(len(self._manager.blocks))), PADDING_BLOCK)

    # --- a step ---

    def _step(self, run: Callable[..., AsyncModelOutput], batch: ScheduledBatch, *previous: Any) -> AsyncModelOutput:
        self._num_steps += 1
        self._batch = batch
        with poisoned_empty():
            output = run(batch, *previous)
        for seq, token_id in zip(batch.sampled_sequences, output.token_ids(), strict=True):
            if not 0 <= token_id < self._llm.vocab_size:
                raise PoisonError(f"step {self._num_steps}: sequence {seq.seq_id} got {token_id}, which is no token")
        self._batch = None
        return output

    def _run_model(
        self, run_model: Callable[..., torch.Tensor], model_input: ModelInput, input_ids: Any, last_tokens: Any
    ) -> torch.Tensor:
        hidden_states = run_model(self._padded_with_nan(model_input), input_ids, last_tokens)
        self._check(hidden_states, model_input)
        return hidden_states

    def _padded_with_nan(self, model_input: ModelInput) -> ModelInput:
        tables = model_input.block_tables
        padded = np.where(tables == PADDING_BLOCK, self._block_of_nan(), tables).astype(tables.dtype)
        return replace(model_input, block_tables=padded)

    def _replay_prefill(self, replay: Callable[..., Any], model_input: ModelInput) -> torch.Tensor | None:
        self._forget_logits(self._runner.prefill_graphs)
        logits = replay(self._padded_with_nan(model_input))
        if logits is not None:
            self._check(logits, model_input)
        return logits

    @staticmethod
    def _forget_logits(graphs: Any) -> None:
        for logits in graphs._logits.values():
            if logits is not None:
                logits.fill_(torch.nan)

    def _replay(self, replay: Callable[..., Any], model_input: ModelInput, *others: Any) -> Any:
        """Rows that pad the batch, and columns behind each table, name a block of NaN; logits begin as NaN."""
        graphs = self._runner.graphs
        graphs._host.block_tables[:] = self._block_of_nan()
        self._forget_logits(graphs)
        output = replay(model_input, *others)
        if output is not None:
            logits, _ = output
            self._check(logits, model_input)
        return output

    def _check(self, rows: torch.Tensor, model_input: ModelInput) -> None:
        """rows [num_seqs, size]"""
        count_comparisons("poison: computed rows against NaN", len(rows))
        is_nan = rows.isnan().any(dim=1).cpu().numpy()
        if self._batch is not None and is_nan.any():
            seq = self._batch.sequences[int(is_nan.argmax())]
            kind = "prefill" if model_input.is_prefill else "decode"
            raise PoisonError(
                f"step {self._num_steps} ({kind}): sequence {seq.seq_id} of {len(seq)} tokens in blocks "
                f"{seq.block_table} read NaN, or an output was left unwritten"
            )
