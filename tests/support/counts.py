"""Counts of the running test: what it compared with which oracle, what occurred, how much of a tolerance it used.

    count_comparisons("BlockManager against reference", 12)     "what against which oracle", number of values
    count_kernel_comparisons("rms_norm", "float16", "interpreted", 640)
    count_event("preemption", 3)
    record_error("decode attention, bf16", 0.8, 2.0)            error found, error allowed

tests/support/report.py attaches the counts to the test as user_properties, so they travel with its report, from xdist's
workers too. Outside pytest nothing reads them. A process that a test starts returns its numbers to the test.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# A way to check a kernel -> its oracle.
KERNEL_ORACLES = {"interpreted": "the reference", "compiled": "the GPU's limits", "on a GPU": "the reference"}
INTERPRETED, COMPILED, ON_A_GPU = KERNEL_ORACLES


@dataclass
class Counts:
    """errors: name -> (error, allowed), those with the largest error / allowed."""

    comparisons: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def record_error(self, name: str, error: float, allowed: float) -> None:
        largest = self.errors.get(name, (-1.0, 1.0))
        if error / allowed > largest[0] / largest[1]:
            self.errors[name] = (error, allowed)

    def to_properties(self) -> list[tuple[str, Any]]:
        """For pytest's user_properties: plain dicts, which xdist can send."""
        return [(name, {**values}) for name, values in vars(self).items() if values]

    def add_properties(self, properties: Iterable[tuple[str, Any]]) -> None:
        """Add what another Counts has written; other properties are passed over."""
        found = dict(properties)
        self.comparisons.update(found.get("comparisons", {}))
        self.events.update(found.get("events", {}))
        for name, (error, allowed) in found.get("errors", {}).items():
            self.record_error(name, error, allowed)


_current = Counts()


@contextmanager
def counting() -> Iterator[Counts]:
    """Within it, the functions below count here."""
    global _current
    outer, _current = _current, Counts()
    try:
        yield _current
    finally:
        _current = outer


def add_counts(properties: Iterable[tuple[str, Any]]) -> None:
    """Add what another process has counted for the running test: its Counts.to_properties()."""
    _current.add_properties(properties)


def count_comparisons(oracle_pair: str, number: int = 1) -> None:
    _current.comparisons[oracle_pair] += number


def count_kernel_comparisons(kernel: str, dtype: object, way: str, number: int = 1) -> None:
    """`number` values of a kernel's output, or of its compiled variants. way: a key of KERNEL_ORACLES."""
    name = f"kernel {kernel}, {str(dtype).removeprefix('torch.')}, {way}"
    count_comparisons(f"{name} against {KERNEL_ORACLES[way]}", number)


def count_event(name: str, number: int = 1) -> None:
    """An event occurred `number` times. 0 makes the event's row appear in the report."""
    _current.events[name] += number


def record_error(name: str, error: float, allowed: float) -> None:
    """Raises ValueError for a number without meaning."""
    if not (allowed > 0 and math.isfinite(error)):
        raise ValueError(f"allowed must be positive and error finite, got {allowed} and {error} for {name!r}")
    _current.record_error(name, error, allowed)
