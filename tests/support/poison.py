"""Poison: an LLM whose KV cache holds NaN wherever nothing may be read, so that a stale read fails at its step.

    with poisoned_llm(model_dir, **options) as llm: ...

A block may be read as long as a sequence owns it, or may still hit it in the prefix cache. So it is filled with NaN

    before the first step                               nothing was written yet
    when it is freed and is not in the prefix cache     finish, abort and preemption alike
    when it is taken for new tokens                     what it held, cached or not, is lost then

A freed block that stays in the prefix cache keeps its keys until it is evicted, which is when it is taken: hitting them
is no stale read. Besides, torch.empty and its kin give NaN, or integers that are no token, slot or block.

A computed row that is NaN raises PoisonError, which names the step, the sequence and its blocks; in a CUDA graph's
replay, its token tells. The instrument wraps methods of one LLM from outside. It sees the first rank only.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from nanovllm import LLM
from nanovllm.engine.model_input import ModelInput
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
    """A step read a value that was never written, or is no longer valid."""


class PoisonedEmpty(TorchFunctionMode):
    """While it is active, uninitialised tensors hold NaN, integers the largest of their type, bools True."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = func(*args, **(kwargs or {}))
        if func not in UNINITIALISED:
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
    """An LLM under poison from its construction on: weights that were not loaded are NaN, too."""
    with poisoned_empty():
        llm = LLM(str(model_dir), **options)
    poison = Poison(llm)
    wrapped = [(llm.scheduler.block_manager, name) for name in ("allocate", "append_block", "deallocate")]
    wrapped += [(poison.runner, name) for name in ("run", "run_model")]
    with llm, ExitStack() as stack:
        for owner, name in wrapped:
            wrapper = partial(getattr(poison, name), getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapper))
        yield llm


class Poison:
    """Wrappers of the methods of one LLM. Steps are counted from 1."""

    def __init__(self, llm: LLM) -> None:
        self.blocks = llm.scheduler.block_manager.blocks
        self.runner: Any = llm._core.executor._runner
        self.batch: ScheduledBatch | None = None  # of the running step
        self.num_steps = 0
        self.runner.kv_cache.fill_(torch.nan)

    def _fill(self, block_ids: list[int]) -> None:
        self.runner.kv_cache[:, :, block_ids] = torch.nan
        count_event("block poisoned", len(block_ids))

    def allocate(self, allocate: Callable[..., None], seq: Sequence) -> None:
        allocate(seq)
        self._fill(seq.block_table[seq.num_tokens_with_kv // seq.block_size :])

    def append_block(self, append_block: Callable[..., None], seq: Sequence) -> None:
        append_block(seq)
        self._fill(seq.block_table[-1:])

    def deallocate(self, deallocate: Callable[..., None], seq: Sequence) -> None:
        table = list(seq.block_table)
        deallocate(seq)
        self._fill([i for i in table if not self.blocks[i].ref_count and not self.blocks[i].is_cached])

    def run(self, run: Callable[..., AsyncModelOutput], batch: ScheduledBatch, *previous: Any) -> AsyncModelOutput:
        self.num_steps += 1
        self.batch = batch
        with poisoned_empty():
            output = run(batch, *previous)
        self.batch = None
        return output

    def run_model(self, run_model: Callable[..., torch.Tensor], model_input: ModelInput, *others: Any) -> torch.Tensor:
        hidden_states = run_model(model_input, *others)
        count_comparisons("poison: computed rows against NaN", len(hidden_states))
        is_nan = hidden_states.isnan().any(dim=1).cpu().numpy()
        if self.batch is not None and is_nan.any():
            row = np.searchsorted(model_input.cu_seqlens_q, is_nan.argmax(), side="right") - 1
            seq, kind = self.batch.sequences[int(row)], "prefill" if model_input.is_prefill else "decode"
            raise PoisonError(
                f"step {self.num_steps} ({kind}): sequence {seq.seq_id} of {len(seq)} tokens in blocks "
                f"{seq.block_table} read NaN, or an output was left unwritten"
            )
        return hidden_states
