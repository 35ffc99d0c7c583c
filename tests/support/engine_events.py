"""Evidence of what happened inside an engine or a scheduler."""

from nanovllm.engine.scheduler import Scheduler
from tests.evidence import happened


def scheduler_events(scheduler: Scheduler) -> dict[str, int]:
    """How often what happened in it since it was made; told to the report as well."""
    manager = scheduler.block_manager
    events = {
        "preemption": scheduler.num_preemptions,
        "prefill chunk": scheduler.num_prefill_chunks,
        "block hit": manager.num_hit_blocks,
        "block evicted": manager.num_evictions,
    }
    for event, number in events.items():
        happened(event, number)
    return events
