"""Trace: what a scheduler was asked to do and what it decided, step by step, as JSON lines that a person can read.

    {"nanovllm_trace": 1, "scheduler": {"num_blocks": 6, ...}, "engine": null, "hashes": null, "caveat": null}
    {"do": "add", "seq": 0, "prompt": [5, 9, 2], "params": {"max_tokens": 3}, "seed": 0}
    {"do": "schedule", "step": 0, "is_prefill": true, "batch": [{"seq": 0, "scheduled": 3, "cached": 0, "stored": 0,
        "table": [0], "hashes": []}], "sampled": [0], "running": [0], "waiting": [], "free_blocks": 5}
    {"do": "postprocess", "step": 0, "tokens": [[0, 7]], "finished": []}
    {"end": 4}

With async_scheduling, "schedule_ahead" stands before "postprocess", with "ahead": null or what is to follow, and
"take_up" in place of the next "schedule": what is left of it.

engine: null for a bare scheduler, else its model (see models.py) and options. hashes: null where blocks are hashed as
ever; else the [tokens, parent, hash] that a test's own hash function gave. caveat: why the run cannot be repeated
exactly, if it cannot. Other events: abort, preempt and finish as a caller asked for them, compute when it raised, test
when another test began to use the same scheduler. An event that raised has "raised" instead of what it decided. A
failing test's trace has {"failed": test, "error": message} before its end.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1

DECISION = {"is_prefill", "batch", "sampled", "running", "waiting", "free_blocks"}

# Event -> the keys it must have, and those it has unless it raised.
EVENTS: dict[str, tuple[set[str], set[str]]] = {
    "add": ({"seq", "prompt", "params", "seed"}, set()),
    "schedule": ({"step"}, DECISION),
    "schedule_ahead": (set(), {"ahead"}),
    "take_up": ({"step"}, DECISION),
    "compute": ({"raised"}, set()),
    "postprocess": ({"step", "tokens"}, {"finished"}),
    "abort": ({"seq"}, {"found"}),
    "preempt": ({"seq"}, set()),
    "finish": ({"seq", "reason"}, set()),
    "test": ({"name"}, set()),
}
HEADER_KEYS = {"nanovllm_trace", "scheduler", "engine", "hashes", "caveat"}


class TraceError(ValueError):
    """A file that cannot be replayed: missing, cut off, of another kind, or of another version."""


@dataclass
class Trace:
    """header and events as above. failure: of the test that left the trace, {"failed": ..., "error": ...}."""

    header: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    failure: dict[str, str] | None = None

    def save(self, path: Path) -> None:
        lines = [self.header, *self.events, *([self.failure] if self.failure else [])]
        lines.append({"end": len(lines)})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Raises TraceError."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise TraceError(
                f"cannot read the trace {path}: {error.strerror}; a failure's report names its trace"
            ) from None
        except UnicodeDecodeError:
            raise TraceError(f"{path} is not a trace: it is not text") from None
        lines = text.splitlines()
        header = _parsed(lines[0]) if lines else None
        if not isinstance(header, dict) or "nanovllm_trace" not in header:
            raise TraceError(f'{path} is not a trace: its first line does not begin with {{"nanovllm_trace": ...')
        if header["nanovllm_trace"] != VERSION:
            raise TraceError(
                f"{path} is a trace of version {header['nanovllm_trace']!r}, and this checkout replays version "
                f"{VERSION}; replay it with the checkout that wrote it"
            )
        _require_keys(path, 1, header, HEADER_KEYS)
        last = _parsed(lines[-1])
        if last != {"end": len(lines) - 1}:
            raise TraceError(f'{path} is cut off or edited: its last line must be {{"end": {len(lines) - 1}}}')
        rest = [(number, _event(path, number, line)) for number, line in enumerate(lines[1:-1], start=2)]
        failure = rest.pop()[1] if rest and "failed" in rest[-1][1] else None
        for number, event in rest:
            _check_event(path, number, event)
        return cls(header, [event for _, event in rest], failure)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _event(path: Path, number: int, line: str) -> dict[str, Any]:
    event = _parsed(line)
    if not isinstance(event, dict):
        raise TraceError(f"{path} is damaged: line {number} is not a JSON object")
    return event


def _check_event(path: Path, number: int, event: dict[str, Any]) -> None:
    kind = event.get("do")
    if kind not in EVENTS:
        raise TraceError(f"{path} is damaged: line {number} has no event {kind!r}; there are {', '.join(EVENTS)}")
    always, unless_raised = EVENTS[kind]
    _require_keys(path, number, event, always if "raised" in event else always | unless_raised)


def _require_keys(path: Path, number: int, event: dict[str, Any], keys: set[str]) -> None:
    if missing := sorted(keys - event.keys()):
        raise TraceError(f"{path} is damaged: line {number} lacks {', '.join(missing)}")
