"""Evidence: what the tests compared, how closely, and what happened on the way, counted while they run.

A number of tests says little: one test may compare one token, another a million. So tests say what they compared, and
`pytest --report` adds it up over all processes.

    compared("BlockManager against reference", 12)     comparisons made, by "what against which oracle"
    compared_kernel("rms_norm", "float16", "interpreted", 640)
    happened("preemption", 3)                          events that a campaign must have met
    tolerated("decode attention, bf16", 0.8, 2.0)      error found, error allowed: the largest ratio is kept

A process that is not pytest's own (the interpreter's, a rank's) writes its counts at exit, if its environment names a
folder in NANOVLLM_EVIDENCE.
"""

import atexit
import json
import math
import os
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = "NANOVLLM_EVIDENCE"  # environment variable: where each process leaves its counts
KERNELS = "kernel"  # the part of which the report makes a table of its own: "kernel: NAME, DTYPE, WAY"
INTERPRETED, COMPILED, ON_A_GPU = WAYS = ("interpreted", "compiled", "on a GPU")


@dataclass
class Counts:
    """tolerances: name -> (error, allowed) of the largest error / allowed."""

    comparisons: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    tolerances: dict[str, tuple[float, float]] = field(default_factory=dict)

    def tolerated(self, name: str, error: float, allowed: float) -> None:
        known = self.tolerances.get(name)
        if known is None or error / allowed > known[0] / known[1]:
            self.tolerances[name] = (error, allowed)

    def add(self, other: "Counts") -> None:
        self.comparisons.update(other.comparisons)
        self.events.update(other.events)
        for name, (error, allowed) in other.tolerances.items():
            self.tolerated(name, error, allowed)

    def clear(self) -> None:
        for counts in (self.comparisons, self.events, self.tolerances):
            counts.clear()


counts = Counts()  # this process's


def compared(component: str, number: int = 1) -> None:
    """`number` values were compared with an oracle's."""
    counts.comparisons[component] += number


def compared_kernel(kernel: str, dtype: object, way: str, number: int = 1) -> None:
    """`number` values of a kernel were compared, or (compiled) `number` of its variants were looked at.

    dtype: a torch.dtype, or its name. way: one of WAYS.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {WAYS}, got {way!r}")
    compared(f"{KERNELS}: {kernel}, {str(dtype).removeprefix('torch.')}, {way}", number)


def happened(event: str, number: int = 1) -> None:
    """An event occurred `number` times; 0 is worth telling, since it makes the event's row appear."""
    counts.events[event] += number


def tolerated(name: str, error: float, allowed: float) -> None:
    """An error of `error` was found where `allowed` would have passed."""
    if not (allowed > 0 and math.isfinite(error)):
        raise ValueError(f"allowed must be positive and error a number, got {allowed} and {error} for {name!r}")
    counts.tolerated(name, error, allowed)


def write(folder: str | None = None) -> None:
    """Leave this process's counts in `folder` (or what NANOVLLM_EVIDENCE names), and start again from nothing."""
    folder = folder or os.environ.get(FOLDER)
    if not folder or not any(vars(counts).values()):
        return
    path = Path(folder) / f"{os.getpid()}-{uuid.uuid4().hex}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(vars(counts)))
    counts.clear()


def read(folder: Path) -> Counts:
    """The counts that all processes left in `folder`, added up."""
    total = Counts()
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text())
        total.add(Counts(Counter(stored["comparisons"]), Counter(stored["events"]), stored["tolerances"]))
    return total


atexit.register(write)
