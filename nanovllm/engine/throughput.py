"""Throughput: tokens per second of prefill and decode, for the progress bar."""

from time import perf_counter

from nanovllm.engine.scheduler import ScheduledBatch


class Throughput:
    """Averages over the steps since construction; str() is the progress bar's text."""

    def __init__(self) -> None:
        self._last = perf_counter()
        self._num_tokens = {True: 0, False: 0}  # by is_prefill
        self._seconds = {True: 0.0, False: 0.0}

    def add(self, batch: ScheduledBatch) -> None:
        """Count a step that has just ended and began when the one before ended."""
        now = perf_counter()
        self._num_tokens[batch.is_prefill] += batch.num_tokens
        self._seconds[batch.is_prefill] += now - self._last
        self._last = now

    def rate(self, is_prefill: bool) -> float:
        """Tokens per second; 0 before the first step of that kind."""
        seconds = self._seconds[is_prefill]
        return self._num_tokens[is_prefill] / seconds if seconds else 0.0

    def __str__(self) -> str:
        return f"prefill {self.rate(True):,.0f} tok/s, decode {self.rate(False):,.0f} tok/s"
