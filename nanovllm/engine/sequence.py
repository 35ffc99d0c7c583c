"""Sequence: the tokens of one request, its KV blocks, and how many of the tokens have been computed."""

from enum import Enum, auto
from typing import Any

from nanovllm.outputs import FinishReason
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class FinishCause(Enum):
    """What ended a request, in order of precedence: where several causes apply, the first one counts.

    reason: the finish_reason in the outputs.
    hides_last_token: whether the last token is left out of the text, since it only ended the request.
    """

    ABORT = 1, "abort", False
    EOS_TOKEN = 2, "stop", True
    STOP_TOKEN = 3, "stop", True
    STOP_STRING = 4, "stop", False
    LENGTH = 5, "length", False

    def __init__(self, _precedence: int, reason: FinishReason, hides_last_token: bool) -> None:
        self.reason: FinishReason = reason
        self.hides_last_token = hides_last_token


class Sequence:
    """Prompt and generated tokens of one request.

    token_ids: prompt, then generated tokens. A worker's copy holds only those of the scheduled step (__getstate__).
    block_table: ids of the KV blocks of the sequence, in order. The key and value of token i are in slot
        block_table[i // block_size] * block_size + i % block_size.
    num_cached_prompt_tokens: prompt tokens found in the prefix cache at the first admission; None before.
    block_hashes: chained hashes of the leading full blocks, as far as the BlockManager has needed them.
    seed: the sampling seed, 0 .. 2**64-1.
    finish_cause: None until the sequence has finished.

    Four counters divide the num_tokens tokens. All count from the first token on:
        num_cached_tokens             tokens that no step computes any more; the scheduled step starts at this position
        num_scheduled_tokens          tokens that the scheduled step computes
        num_cached_tokens_after_step  the sum of the two
        num_tokens_with_kv            tokens whose keys and values are in the KV cache; no step writes them again
    num_tokens_with_kv equals num_cached_tokens, but for one case: when the prefix cache holds the whole sequence,
    it is num_tokens and num_cached_tokens is one less, since the last token is computed again for its logits.
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
        self.finish_cause: FinishCause | None = None
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
    def finish_reason(self) -> FinishReason | None:
        return None if self.finish_cause is None else self.finish_cause.reason

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
        """Number of blocks that num_tokens tokens need."""
        return -(-self.num_tokens // self.block_size)

    @property
    def num_uncached_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_tokens - self.num_cached_tokens

    @property
    def is_decodable(self) -> bool:
        """Whether only the last token is left to compute."""
        return self.num_uncached_tokens == 1

    @property
    def is_sampled(self) -> bool:
        """Whether the scheduled step computes the last token, so that a new one is sampled from its logits."""
        return self.num_cached_tokens_after_step == self.num_tokens

    @property
    def num_cached_tokens_after_step(self) -> int:
        """num_cached_tokens once the scheduled step has been computed."""
        return self.num_cached_tokens + self.num_scheduled_tokens

    @property
    def scheduled_token_ids(self) -> list[int]:
        """The tokens that the scheduled step computes. They start at position num_cached_tokens."""
        start = self.num_cached_tokens - self._first_token
        return self.token_ids[start : start + self.num_scheduled_tokens]

    def block_token_ids(self, index: int) -> list[int]:
        """Tokens of the sequence's `index`-th block; fewer than block_size in the last."""
        return self.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def append_token(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.num_tokens += 1

    # What a worker needs to compute and sample the scheduled step. It depends on the tokens that the step computes, and
    # not on those that were generated: a preempted sequence prefills its own output again.
    _WORKER_FIELDS = (
        *("seq_id", "block_size", "sampling_params", "seed", "num_tokens", "num_prompt_tokens", "block_table"),
        *("num_cached_tokens", "num_tokens_with_kv", "num_scheduled_tokens"),
    )

    def __getstate__(self) -> tuple[Any, ...]:
        # A step that async_scheduling sends ahead computes the last token, which the scheduled step may leave out.
        token_ids = self.scheduled_token_ids
        if not self.is_sampled:
            token_ids.append(self.last_token)
        return (*(getattr(self, name) for name in self._WORKER_FIELDS), token_ids)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *values, token_ids = state
        for name, value in zip(self._WORKER_FIELDS, values, strict=True):
            setattr(self, name, value)
        self.token_ids = token_ids
        self._first_token = self.num_cached_tokens
        self.status = SequenceStatus.RUNNING
        self.finish_cause = None
        self.num_cached_prompt_tokens = None
        self.block_hashes = []
