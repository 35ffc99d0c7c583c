"""Poison: an LLM whose KV cache holds NaN wherever nothing may be read, so that a stale read shows at its step.

    with poisoned_llm(model_dir, **options) as llm: ...

A block may be read as long as a sequence owns it, or may still hit it in the prefix cache. So it is filled with NaN

    before the first step                               nothing was written yet
    when it is freed and is not in the prefix cache     finish, abort and preemption alike
    when it is taken for new tokens                     what it held, cached or not, is forgotten then

and a freed block that stays in the prefix cache keeps its keys until it is evicted, which is when it is taken: hitting
them is no stale read. Beside that, torch.empty and its kin give NaN, or integers that are no token, slot or block; the
padding of block tables names a block of NaN, if one is free; and so do the rows that pad a CUDA graph's batch.

Every step is looked at: a row that is NaN raises PoisonError, which names the step, the sequence and the block. The
instrument wraps methods of one LLM, from outside; nothing in nanovllm knows of it. It sees the first rank only.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

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

UNINITIALISED = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
}


class PoisonError(AssertionError):
    """Something was read that nobody had written."""


class PoisonedEmpty(TorchFunctionMode):
    """While it is active, uninitialised tensors hold NaN, integers the largest of their type, bools True."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return fill_with_poison(result) if func in UNINITIALISED else result


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """While it is active, ModelRunners compute under PoisonedEmpty. They remove the function modes around them."""
    plain = model_runner.plain_torch_state

    @contextmanager
    def poisoned(*args: Any, **kwargs: Any) -> Iterator[None]:
        with plain(*args, **kwargs), PoisonedEmpty():
            yield

    with patch.object(model_runner, "plain_torch_state", poisoned):
        yield


def fill_with_poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_llm(model_dir: str | Path, **options: Any) -> Iterator[LLM]:
    """An LLM under Poison from its construction on: weights that were not loaded are NaN, too."""
    with poisoned_empty():
        llm = LLM(str(model_dir), **options)
    with llm, Poison(llm).installed():
        yield llm


class Poison:
    """The instrument around one LLM. num_steps counts those that were computed, from 1."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._manager = llm.scheduler.block_manager
        self._runner: Any = llm._core.executor._runner
        self._batch: ScheduledBatch | None = None
        self._fate = ["never written"] * len(self._manager.blocks)  # of each block, when it was last poisoned
        self.num_steps = 0

    @contextmanager
    def installed(self) -> Iterator["Poison"]:
        self._runner.kv_cache.fill_(torch.nan)
        with ExitStack() as stack:
            for owner, name, around in (
                (self._manager, "allocate", self._allocate),
                (self._manager, "append_block", self._open_block),
                (self._manager, "deallocate", self._deallocate),
                (self._runner, "run", self._run),
                (self._runner, "launch", self._launch),
                (self._runner, "run_model", self._run_model),
            ):
                stack.enter_context(wrapped(owner, name, around))
            if self._runner.graphs is not None:
                stack.enter_context(wrapped(self._runner.graphs, "replay", self._replay))
            yield self

    # --- what is poisoned, and when ---

    def fill(self, block_ids: list[int], fate: str) -> None:
        for block_id in block_ids:
            self._runner.kv_cache[:, :, block_id] = torch.nan
            self._fate[block_id] = f"{fate} after step {self.num_steps}"
        count_event("block poisoned", len(block_ids))

    def _allocate(self, allocate: Callable[..., None], seq: Sequence) -> None:
        allocate(seq)
        num_hits = seq.num_tokens_with_kv // seq.block_size
        self.fill(seq.block_table[num_hits:], f"taken by sequence {seq.seq_id}")

    def _open_block(self, append_block: Callable[..., None], seq: Sequence) -> None:
        append_block(seq)
        self.fill(seq.block_table[-1:], f"taken by sequence {seq.seq_id}")

    def _deallocate(self, deallocate: Callable[..., None], seq: Sequence) -> None:
        table = list(seq.block_table)
        deallocate(seq)
        self.fill([block_id for block_id in table if self._is_dead(block_id)], f"freed by sequence {seq.seq_id}")

    def _is_dead(self, block_id: int) -> bool:
        block = self._manager.blocks[block_id]
        return block.ref_count == 0 and not block.is_cached

    def _trap(self) -> int:
        """A block of NaN for padding to name; PADDING_BLOCK when there is none."""
        dead = (block.block_id for block in self._manager.blocks if self._is_dead(block.block_id))
        return next(dead, PADDING_BLOCK)

    # --- a step ---

    def _run(self, run: Callable[..., list[int]], batch: ScheduledBatch) -> list[int]:
        self.num_steps += 1
        self._batch = batch
        with poisoned_empty():
            token_ids = run(batch)
        self._check_tokens(batch, token_ids)
        self._batch = None
        return token_ids

    def _launch(self, launch: Callable[..., AsyncModelOutput], batch: ScheduledBatch, *before: Any) -> AsyncModelOutput:
        self.num_steps += 1
        self._batch = batch
        with poisoned_empty():
            launched = launch(batch, *before)
        self._check_tokens(batch, launched.token_ids())
        self._batch = None
        return launched

    def _check_tokens(self, batch: ScheduledBatch, token_ids: list[int]) -> None:
        for seq, token_id in zip(batch.sampled_sequences, token_ids, strict=True):
            if not 0 <= token_id < self._llm.vocab_size:
                raise PoisonError(f"step {self.num_steps}: sequence {seq.seq_id} got {token_id}, which is no token")

    def _run_model(self, run_model: Callable[..., torch.Tensor], model_input: ModelInput, *rest: Any) -> torch.Tensor:
        if model_input.block_tables is not None:
            tables = model_input.block_tables
            trapped = np.where(tables == PADDING_BLOCK, self._trap(), tables).astype(tables.dtype)
            model_input = replace(model_input, block_tables=trapped)
        hidden_states = run_model(model_input, *rest)
        self._check(hidden_states, model_input.cu_seqlens_q, model_input)
        return hidden_states

    def _replay(
        self, replay: Callable[..., torch.Tensor | None], model_input: ModelInput, *rest: Any
    ) -> torch.Tensor | None:
        """Rows that pad the batch, and columns behind each table, name a block of NaN; logits begin as NaN."""
        graphs = self._runner.graphs
        graphs._host.block_tables[:] = self._trap()
        for logits in graphs._logits.values():
            if logits is not None:
                logits.fill_(torch.nan)
        logits = replay(model_input, *rest)
        if logits is not None:
            self._check(logits, np.arange(len(logits) + 1), model_input)
        return logits

    def _check(self, rows: torch.Tensor, bounds: np.ndarray, model_input: ModelInput) -> None:
        """rows [num_rows, size]; those of sequence i begin at bounds[i]."""
        count_comparisons("poison: computed rows against NaN", len(rows))
        is_nan = rows.isnan().any(dim=1).cpu().numpy()
        if self._batch is not None and is_nan.any():
            index = int(np.searchsorted(bounds, is_nan.argmax(), side="right")) - 1
            kind = "prefill" if model_input.is_prefill else "decode"
            raise PoisonError(
                f"step {self.num_steps} ({kind}): sequence {self._batch.sequences[index].seq_id} read NaN: "
                f"{self._what_was_read(index, model_input)}"
            )

    def _what_was_read(self, index: int, model_input: ModelInput) -> str:
        """The first poisoned slot among those that the input says a sequence reads.

        Looked for in the first layer: in later ones a NaN has been handed on to the sequence's own new keys.
        """
        keys_and_values = self._runner.kv_cache[:, 0]  # [2, num_blocks, block_size, num_kv_heads, head_dim]
        block_size = keys_and_values.shape[2]
        if model_input.block_tables is not None:
            table = model_input.block_tables[index].tolist()
            for position in range(int(model_input.context_lens[index])):
                block_id, offset = table[position // block_size], position % block_size
                if keys_and_values[:, block_id, offset].isnan().any():
                    return f"position {position} in block {block_id}, slot {offset}, {self._fate[block_id]}"
        own = self._batch.sequences[index].block_table if self._batch is not None else []
        return f"no slot that the input names: an output left unwritten, or a read beyond its blocks {own}"


@contextmanager
def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """owner.name(...) is around(the method, ...)."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *args: around(method, *args))
    try:
        yield
    finally:
        delattr(owner, name)
