"""GenerationProgress: tokens over the time since the step before; the forms of the details beside the bar."""

import itertools

import pytest

from nanovllm.engine import throughput as module
from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import SequenceStatus
from nanovllm.engine.throughput import GenerationProgress
from tests.support.scheduling import make_sequence


def batch(is_prefill: bool, *num_tokens: int) -> ScheduledBatch:
    return ScheduledBatch(is_prefill, (), num_tokens, ())


def test_rates_are_tokens_over_seconds_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 12.5, 13.0])
    monkeypatch.setattr(module, "perf_counter", lambda: next(times))
    progress = GenerationProgress([], 100, is_shown=False)
    assert ", prefill 0 tok/s, decode 0 tok/s" in progress.details(), "before the first step"
    progress.add(batch(True, 19_000, 998), ())
    progress.add(batch(False, 2), ())
    progress.add(batch(False, 2, 4), ())
    assert {", prefill 9,999 tok/s, decode 8 tok/s", ", prefill 9,999 decode 8 tok/s"} <= set(progress.details())


def test_details_come_in_forms_from_long_to_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 10,000 tokens a second on, the short forms count thousands."""
    times = itertools.count()
    monkeypatch.setattr(module, "perf_counter", lambda: float(next(times)))
    request = RequestState(make_sequence([1, 2, 3], max_tokens=5), None)
    for requests, count, num_tokens in (([request], "0/5 tokens", ""), ([request] * 2, "0/2 prompts", ", 0 tokens")):
        progress = GenerationProgress(requests, 100, is_shown=False)
        progress.add(batch(True, 10_000), ())
        progress.add(batch(False, 999_600), ())
        rates = ", prefill 10,000 tok/s, decode 999,600 tok/s"
        short = [", prefill 10k decode 1,000k tok/s", ", 1,000k tok/s", ""]
        assert (progress.count(), progress.details()) == (count, [num_tokens + rates, rates, *short])


def test_a_request_that_ends_early_counts_once_with_its_maximum() -> None:
    """Which is max_tokens, or what max_model_len leaves beside the prompt."""
    maxima = (5, 5, 10**9, 10**9)
    requests = [RequestState(make_sequence([1, 2, 3], max_tokens=n, seq_id=i), None) for i, n in enumerate(maxima)]
    first, *others, last = (request.sequence for request in requests)
    progress = GenerationProgress(requests, 100, is_shown=False)
    for seq in (first, *others, last):
        seq.append_token(7)
    first.status = SequenceStatus.FINISHED
    progress.add(batch(False, 2), [first, *others, last])
    assert (progress.count(), progress.n, progress.total) == ("1/4 prompts", 5 + 3, 5 + 5 + 97 + 97)
    for seq in others:
        seq.status = SequenceStatus.FINISHED
    progress.add(batch(False, 2), [first, *others])
    assert (progress.count(), progress.n) == ("3/4 prompts", 5 + 5 + 97 + 1)
    assert progress.details()[0].startswith(", 4 tokens, ")
    progress.finish()
    assert (progress.count(), progress.n) == ("4/4 prompts", progress.total)
