"""Sequence: one request's tokens and blocks."""

from enum import Enum, auto
from itertools import count

from smallvllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    ids = count()

    def __init__(self, token_ids: list[int], sampling_params: SamplingParams, block_size: int):
        if not token_ids:
            raise ValueError("the prompt is empty")
        self.seq_id = next(Sequence.ids)
        self.block_size = block_size
        self.status = SequenceStatus.WAITING
        self.token_ids = list(token_ids)
        self.num_tokens = len(token_ids)
        self.num_prompt_tokens = len(token_ids)
        self.last_token = token_ids[-1]
        self.num_cached_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_output_placeholders = 0  # tokens that steps in flight sample
        self.is_prefill = True
        self.block_table: list[int] = []
        self.temperature = sampling_params.temperature
        self.max_tokens = sampling_params.max_tokens
        self.ignore_eos = sampling_params.ignore_eos

    def __len__(self):
        return self.num_tokens

    @property
    def is_finished(self):
        return self.status is SequenceStatus.FINISHED

    @property
    def num_completion_tokens(self):
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_tokens_ahead(self):
        return self.num_tokens + self.num_output_placeholders

    @property
    def num_blocks(self):
        return -(-self.num_tokens_ahead // self.block_size)

    def prefix(self, num_blocks: int) -> list[int]:
        return self.token_ids[: num_blocks * self.block_size]

    def block(self, index: int) -> list[int]:
        return self.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def append_token(self, token_id: int):
        self.token_ids.append(token_id)
        self.last_token = token_id
        self.num_tokens += 1

    def __getstate__(self):
        tokens = self.token_ids if self.is_prefill else self.last_token
        counters = (self.num_tokens, self.num_prompt_tokens, self.num_cached_tokens, self.num_scheduled_tokens)
        return (*counters, self.num_output_placeholders, self.block_size, self.block_table, tokens)

    def __setstate__(self, state):
        (*counters, self.num_output_placeholders, self.block_size, self.block_table, tokens) = state
        self.num_tokens, self.num_prompt_tokens, self.num_cached_tokens, self.num_scheduled_tokens = counters
        self.is_prefill = isinstance(tokens, list)
        self.token_ids = tokens if self.is_prefill else []
        self.last_token = tokens[-1] if self.is_prefill else tokens
