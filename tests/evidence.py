"""Evidence: what the tests compared, how closely, and what happened on the way, counted while they run.

A number of tests says little: one test may compare one token, another a million. So tests say what they compared, and
`pytest --report` adds it up over all processes.

    compared("BlockManager against reference", 12)     comparisons made, by component
    happened("preemption", 3)                          events that a campaign must have met
    tolerated("decode attention, bf16", 0.8, 2.0)      error found, error allowed: the largest ratio is kept

A process that is not pytest's own (the interpreter's, a rank's) writes its counts at exit, if its environment names a
folder in NANOVLLM_EVIDENCE.
"""

import atexit
import json
import os
import uuid
from collections import Counter
from pathlib import Path

FOLDER = "NANOVLLM_EVIDENCE"  # environment variable: where each process leaves its counts

comparisons: Counter[str] = Counter()
events: Counter[str] = Counter()
tolerances: dict[str, tuple[float, float]] = {}  # name -> (error, allowed) of the largest error / allowed


def compared(component: str, number: int = 1) -> None:
    """`number` values were compared with an oracle's."""
    comparisons[component] += number


def happened(event: str, number: int = 1) -> None:
    """An event occurred `number` times; 0 is worth telling, since it makes the event's row appear."""
    events[event] += number


def tolerated(name: str, error: float, allowed: float) -> None:
    """An error of `error` was found where `allowed` would have passed."""
    if allowed <= 0:
        raise ValueError(f"allowed must be positive, got {allowed} for {name!r}")
    known = tolerances.get(name)
    if known is None or error / allowed > known[0] / known[1]:
        tolerances[name] = (error, allowed)


def write(folder: str | None = None) -> None:
    """Leave this process's counts in `folder` (or what NANOVLLM_EVIDENCE names), and start again from nothing."""
    folder = folder or os.environ.get(FOLDER)
    if not folder or not (comparisons or events or tolerances):
        return
    path = Path(folder) / f"{os.getpid()}-{uuid.uuid4().hex}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"comparisons": comparisons, "events": events, "tolerances": tolerances}))
    for counts in (comparisons, events, tolerances):
        counts.clear()


atexit.register(write)
