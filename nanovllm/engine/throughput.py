"""GenerationProgress: the progress bar of generate(), with the tokens per second of prefill and decode."""

import math
from collections.abc import Sequence as Sequences
from time import perf_counter

from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.progress import Progress


class GenerationProgress(Progress):
    """Progress bar of generate(). It counts tokens, so that a single long request shows progress too.

    The total is the largest number of tokens that `requests` can generate. A request that ends earlier counts as if it
    had generated its maximum. Tokens per second are averaged over all steps.
    """

    def __init__(self, requests: Sequences[RequestState], max_model_len: int, is_shown: bool) -> None:
        self._max_model_len = max_model_len
        self._num_prompts = len(requests)
        self._num_finished = self._num_tokens = 0
        self._counted: dict[int, int] = {}  # seq_id -> tokens counted so far; the maximum for a finished request
        self._last_step = perf_counter()
        self._computed, self._seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}  # tokens, by is_prefill
        total = sum(self._max_completion_tokens(request.sequence) for request in requests)
        super().__init__("Generating", total, is_shown, is_last_line_wanted=True)

    def add(self, batch: ScheduledBatch, advanced: Sequences[Sequence]) -> None:
        """Count a step that took from the one before until now. advanced: the sequences with new tokens."""
        now = perf_counter()
        self._computed[batch.is_prefill] += batch.num_tokens
        self._seconds[batch.is_prefill] += now - self._last_step
        self._last_step = now
        num_new = 0
        for seq in advanced:  # a sequence has several new tokens if other threads have computed steps
            most, before = self._max_completion_tokens(seq), self._counted.get(seq.seq_id, 0)
            if before == most:
                continue
            self._counted[seq.seq_id] = most if seq.is_finished else seq.num_completion_tokens
            self._num_tokens += seq.num_completion_tokens - before
            self._num_finished += seq.is_finished
            num_new += self._counted[seq.seq_id] - before
        self.update(num_new)

    def finish(self) -> None:
        """Count requests that were aborted between steps as finished."""
        self._num_finished = self._num_prompts
        self.update(self.total - self.n)

    def count(self) -> str:
        if self._num_prompts == 1:
            return f"{self._num_tokens:,}/{self.total:,} tokens"
        return f"{self._num_finished:,}/{self._num_prompts:,} prompts"

    def details(self) -> list[str]:
        prefill, decode = (self._computed[kind] / (self._seconds[kind] or math.inf) for kind in (True, False))
        rates = f", prefill {prefill:,.0f} tok/s, decode {decode:,.0f} tok/s"
        short_rates = f", prefill {_short(prefill)} decode {_short(decode)} tok/s"
        num_tokens = f", {self._num_tokens:,} tokens" if self._num_prompts > 1 else ""
        return [num_tokens + rates, rates, short_rates, f", {_short(decode)} tok/s", ""]

    def _max_completion_tokens(self, seq: Sequence) -> int:
        return min(seq.sampling_params.max_tokens, self._max_model_len - seq.num_prompt_tokens)


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate < 10_000 else f"{rate / 1000:,.0f}k"
