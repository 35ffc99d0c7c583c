"""ThroughputMeter: tokens over the time since the step before."""

import pytest

from nanovllm.engine import throughput as module
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.throughput import ThroughputMeter


def batch(is_prefill: bool, *num_tokens: int) -> ScheduledBatch:
    return ScheduledBatch(is_prefill, (), num_tokens, ())


def test_rates_are_tokens_over_seconds_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 12.5, 13.0])
    monkeypatch.setattr(module, "perf_counter", lambda: next(times))
    throughput = ThroughputMeter()
    throughput.add(batch(True, 3000, 1000))
    throughput.add(batch(False, 2))
    throughput.add(batch(False, 2, 4))
    assert throughput.rate(is_prefill=True) == 2000
    assert throughput.rate(is_prefill=False) == 8
    assert str(throughput) == "prefill 2,000 tok/s, decode 8 tok/s"


def test_before_the_first_step_rates_are_zero() -> None:
    assert str(ThroughputMeter()) == "prefill 0 tok/s, decode 0 tok/s"
