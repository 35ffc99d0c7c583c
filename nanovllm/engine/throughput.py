"""ThroughputMeter: tokens per second of prefill and decode. GenerationProgress: the progress bar of generate()."""

from collections.abc import Sequence as Sequences
from time import perf_counter

from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.progress import Progress


class ThroughputMeter:
    """Throughput, averaged over all steps since construction. str() formats it for the progress bar."""

    def __init__(self) -> None:
        self._last = perf_counter()
        self._num_tokens, self._seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}  # by is_prefill

    def add(self, batch: ScheduledBatch) -> None:
        """Count a step that ends now. Its duration is the time since the previous call."""
        now = perf_counter()
        self._num_tokens[batch.is_prefill] += batch.num_tokens
        self._seconds[batch.is_prefill] += now - self._last
        self._last = now

    def rate(self, is_prefill: bool) -> float:
        """Tokens per second of prefill or decode steps; 0 before the first one."""
        seconds = self._seconds[is_prefill]
        return self._num_tokens[is_prefill] / seconds if seconds else 0.0

    def __str__(self) -> str:
        return f"prefill {self.rate(True):,.0f} tok/s, decode {self.rate(False):,.0f} tok/s"


class GenerationProgress(Progress):
    """Progress bar of generate(). It counts tokens, so that a single long request shows progress too.

    The total is the largest number of tokens that `requests` can generate. A request that ends earlier counts as if it
    had generated its maximum.
    """

    def __init__(self, requests: Sequences[RequestState], max_model_len: int, is_shown: bool) -> None:
        self._max_model_len = max_model_len
        self._num_prompts = len(requests)
        self._num_finished = self._num_tokens = 0
        self._counted: dict[int, int] = {}  # seq_id -> tokens counted so far; the maximum for a finished request
        self._throughput = ThroughputMeter()
        total = sum(self._max_completion_tokens(request.sequence) for request in requests)
        super().__init__("Generating", total, is_shown, is_last_line_wanted=True)

    def add(self, batch: ScheduledBatch, advanced: Sequences[Sequence]) -> None:
        """Count a step that ends now. advanced: the sequences with new tokens."""
        self._throughput.add(batch)
        before = self._num_tokens
        num_unused = 0
        for seq in advanced:  # a sequence has several new tokens if other threads have computed steps
            is_finished, most = seq.is_finished, self._max_completion_tokens(seq)
            counted = self._counted.get(seq.seq_id, 0)
            if counted == most:
                continue
            self._num_tokens += seq.num_completion_tokens - counted
            self._counted[seq.seq_id] = most if is_finished else seq.num_completion_tokens
            if is_finished:
                self._num_finished += 1
                num_unused += most - seq.num_completion_tokens
        self.update(self._num_tokens - before + num_unused)

    def finish(self) -> None:
        """Count requests that were aborted between steps as finished."""
        self._num_finished = self._num_prompts
        self.update(self.total - self.n)

    def count(self) -> str:
        if self._num_prompts == 1:
            return f"{self._num_tokens:,}/{self.total:,} tokens"
        return f"{self._num_finished:,}/{self._num_prompts:,} prompts"

    def details(self) -> list[str]:
        rates = f", {self._throughput}"
        short_rates = f", prefill {self._rate(True)} decode {self._rate(False)} tok/s"
        num_tokens = f", {self._num_tokens:,} tokens" if self._num_prompts > 1 else ""
        return [num_tokens + rates, rates, short_rates, f", {self._rate(False)} tok/s", ""]

    def _rate(self, is_prefill: bool) -> str:
        rate = self._throughput.rate(is_prefill)
        return f"{rate:,.0f}" if rate < 10_000 else f"{rate / 1000:,.0f}k"

    def _max_completion_tokens(self, seq: Sequence) -> int:
        return min(seq.sampling_params.max_tokens, self._max_model_len - seq.num_prompt_tokens)
