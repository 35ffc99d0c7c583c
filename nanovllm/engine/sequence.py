"""Sequence: one request's tokens, where their keys and values stand, and how far its computing has come."""

from enum import Enum, auto
from typing import Any

from nanovllm.outputs import FinishReason
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Prompt and generated tokens of one request.

    token_ids: prompt, then generated tokens. In a worker's copy only those of the scheduled step (see __getstate__).
    block_table: ids of the KV blocks that hold the sequence, in order; token i lives in
        slot block_table[i // block_size] * block_size + i % block_size.
    num_cached_tokens: leading tokens that need no computing any more; the next step starts there.
    num_tokens_with_kv: leading tokens whose keys and values stand in the cache and must not be written again. It equals
        num_cached_tokens, except when the whole sequence was found in the prefix cache: then the last token is
        computed once more for its logits, but not stored.
    num_scheduled_tokens: tokens the scheduled step computes.
    num_cached_prompt_tokens: prompt tokens found in the prefix cache at the first admission; None before.
    block_hashes: chained hashes of the leading full blocks, as far as the BlockManager has needed them.
    seed: the resolved sampling seed, 0 .. 2**64-1.
    """

    def __init__(
        self,
        token_ids: list[int],
        sampling_params: SamplingParams | None = None,
        *,
        seq_id: int = 0,
        block_size: int = 256,
        seed: int = 0,
    ) -> None:
        if not token_ids:
            raise ValueError("token_ids must hold at least one token, got none")
        self.seq_id = seq_id
        self.block_size = block_size
        self.sampling_params = sampling_params or SamplingParams()
        self.seed = seed
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.token_ids = list(token_ids)
        self.num_tokens = len(self.token_ids)
        self.num_prompt_tokens = self.num_tokens
        self.block_table: list[int] = []
        self.num_cached_tokens = 0
        self.num_tokens_with_kv = 0
        self.num_scheduled_tokens = 0
        self.num_cached_prompt_tokens: int | None = None
        self.block_hashes: list[int] = []
        self._first_token = 0  # position of token_ids[0]; not 0 only in a worker's copy

    def __len__(self) -> int:
        return self.num_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence(seq_id={self.seq_id}, {self.status.name}, tokens={self.num_tokens}, "
            f"cached={self.num_cached_tokens}, block_table={self.block_table})"
        )

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def num_completion_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def last_token(self) -> int:
        return self.token_ids[-1]

    @property
    def num_blocks(self) -> int:
        """Blocks that hold num_tokens tokens."""
        return -(-self.num_tokens // self.block_size)

    @property
    def num_uncached_tokens(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return self.num_tokens - self.num_cached_tokens

    @property
    def is_decodable(self) -> bool:
        """Exactly the last token is left to compute."""
        return self.num_uncached_tokens == 1

    @property
    def is_sampled(self) -> bool:
        """The scheduled step computes the last token, so a new one is sampled from its logits."""
        return self.num_cached_tokens_after_step == self.num_tokens

    @property
    def num_cached_tokens_after_step(self) -> int:
        """Leading tokens that need no computing any more when the scheduled step is over."""
        return self.num_cached_tokens + self.num_scheduled_tokens

    @property
    def scheduled_token_ids(self) -> list[int]:
        """The tokens that the scheduled step computes, from position num_cached_tokens on."""
        start = self.num_cached_tokens - self._first_token
        return self.token_ids[start : start + self.num_scheduled_tokens]

    def block_token_ids(self, index: int) -> list[int]:
        """Tokens of the sequence's `index`-th block; fewer than block_size in the last."""
        return self.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def append_token(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.num_tokens += 1

    # What a worker needs to compute and sample the scheduled step, in this order. Never depends on what was generated
    # (a preempted sequence prefills its own output again), only on what will be computed.
    _WORKER_FIELDS = (
        "seq_id",
        "block_size",
        "sampling_params",
        "seed",
        "num_tokens",
        "num_prompt_tokens",
        "block_table",
        "num_cached_tokens",
        "num_tokens_with_kv",
        "num_scheduled_tokens",
    )

    def __getstate__(self) -> tuple[Any, ...]:
        # num_scheduled_tokens is 0 when async_scheduling sends a step while the current one computes nothing of it.
        token_ids = self.scheduled_token_ids or [self.last_token]
        return (*(getattr(self, name) for name in self._WORKER_FIELDS), token_ids)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *values, token_ids = state
        for name, value in zip(self._WORKER_FIELDS, values, strict=True):
            setattr(self, name, value)
        self.token_ids = token_ids
        self._first_token = self.num_cached_tokens
        self.status = SequenceStatus.RUNNING
        self.finish_reason = None
        self.num_cached_prompt_tokens = None
        self.block_hashes = []
