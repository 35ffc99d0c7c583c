"""Events inside a scheduler, counted for the report and for the campaign that requires them."""

from collections import Counter
from collections.abc import Iterable, Mapping

from nanovllm.engine.scheduler import Scheduler
from tests.support.counts import count_event


def scheduler_events(scheduler: Scheduler) -> Counter[str]:
    """Event -> how often it occurred since the scheduler was made."""
    manager = scheduler.block_manager
    events = {
        "preemption": scheduler.num_preemptions,
        "prefill chunk": scheduler.num_prefill_chunks,
        "block hit": manager.num_hit_blocks,
        "block evicted": manager.num_evictions,
    }
    for event, number in events.items():
        count_event(event, number)
    return Counter(events)


def assert_occurred(events: Mapping[str, int], required: Iterable[str]) -> None:
    """Fail unless each required event occurred at least once: the campaign would have shown nothing about it."""
    missing = [event for event in required if not events.get(event)]
    assert not missing, f"this campaign is vacuous: no {' and no '.join(missing)} in all of its runs; {dict(events)}"
