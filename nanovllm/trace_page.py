"""The page of `nanovllm trace`: a ScheduleTrace as one HTML file that needs no other file and no network.

The picture is SVG, made here. assets/trace_page.html holds the style, and the script that shows the chosen step.
"""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from nanovllm.outputs import RequestOutput
from nanovllm.schedule_trace import ScheduleTrace

ROW_HEIGHT = 18  # pixels, as are all lengths here
BAND_HEIGHT = 60  # of the two bar charts above the rows
BAND_GAP = 12
AXIS_HEIGHT = 20
MIN_STEP_WIDTH, MAX_STEP_WIDTH, WISHED_WIDTH = 3, 18, 900
MIN_TICK_DISTANCE = 40
STEP_FIELDS = ("is_prefill", "computed", "running", "waiting", "admitted", "preempted", "finished")  # for the script
MAX_LABEL = 300  # characters of a prompt beside its row; the page has the whole prompt below


class Span(NamedTuple):
    """Steps first to last, in which a sequence is "waiting", "preempted" (waits again), "prefill", "decode" or "idle".

    idle: it runs, and the step computes none of its tokens, since prefill has priority.
    """

    state: str
    first: int
    last: int


def spans_of(trace: ScheduleTrace, seq_id: int) -> list[Span]:
    """What the sequence did, in order. Each prefill step is a span of its own; other equal states are joined."""
    spans: list[Span] = []
    has_run = False
    for index, step in enumerate(trace.steps):
        if seq_id in step.computed:
            state = "prefill" if step.is_prefill else "decode"
        elif seq_id in step.running:
            state = "idle"
        elif seq_id in step.waiting:
            state = "preempted" if has_run else "waiting"
        else:
            continue
        has_run = has_run or seq_id in step.running
        if spans and spans[-1].state == state != "prefill":
            spans[-1] = spans[-1]._replace(last=index)
        else:
            spans.append(Span(state, index, index))
    return spans


def trace_page(trace: ScheduleTrace, prompts: Sequence[str], outputs: Sequence[RequestOutput], subtitle: str) -> str:
    """The HTML text. outputs: of the prompts, in their order. Raises ValueError if nothing was recorded."""
    if not trace.steps:
        raise ValueError(
            "a trace must have at least one step to be drawn, and it has none: generate within recording()"
        )
    requests = {
        output["seq_id"]: {"prompt": prompt, "text": output["text"], "reason": output["finish_reason"]}
        for prompt, output in zip(prompts, outputs, strict=True)
    }
    shown = {seq_id: escape(request["prompt"][:MAX_LABEL]) for seq_id, request in requests.items()}
    labels = "".join(f'<li title="{shown[id]}"><b>{id}</b> {shown[id]}</li>' for id in trace.seq_ids)
    slots = {
        "subtitle": escape(subtitle),
        "facts": "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _facts(trace).items()),
        "most_blocks": f"{_most_blocks(trace)}",
        "most_tokens": f"{_most_tokens(trace)}",
        "labels": labels,
        "picture": _picture(trace),
        "last_step": f"{len(trace.steps) - 1}",
        # "<" would end the script element in "</script>"
        "data": json.dumps({**_data(trace), "requests": requests}, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = (files("nanovllm.assets") / "trace_page.html").read_text(encoding="utf-8")
    parts = page.split("@@")  # text, name of a slot, text, ...
    return "".join(slots[part] if index % 2 else part for index, part in enumerate(parts))


def _facts(trace: ScheduleTrace) -> dict[str, str]:
    num_prefills = sum(step.is_prefill for step in trace.steps)
    return {
        "requests": f"{len(trace.seq_ids)}",
        "steps": f"{len(trace.steps)} ({num_prefills} prefill, {len(trace.steps) - num_prefills} decode)",
        "tokens computed": f"{sum(step.num_tokens for step in trace.steps):,}",
        "tokens found in the prefix cache": f"{trace.num_hit_tokens:,}",
        "preemptions": f"{trace.num_preemptions}",
        "evictions": f"{sum(step.num_evictions for step in trace.steps)}",
        "most blocks in use": f"{max(step.num_owned_blocks for step in trace.steps)} of {trace.num_blocks:,}",
        "block size": f"{trace.block_size} tokens",
    }


def _most_blocks(trace: ScheduleTrace) -> int:
    return max(step.num_owned_blocks + len(step.cached_blocks) for step in trace.steps)


def _most_tokens(trace: ScheduleTrace) -> int:
    return max(step.num_tokens for step in trace.steps)


def _data(trace: ScheduleTrace) -> dict[str, Any]:
    """For the script. Block tables and cached blocks are given where they changed since the step before."""
    steps = []
    tables: dict[int, tuple[int, ...]] = {}
    cached: frozenset[int] = frozenset()
    for step in trace.steps:
        steps.append(
            {
                **{name: getattr(step, name) for name in STEP_FIELDS},
                "evictions": step.num_evictions,
                "tables": {seq_id: table for seq_id, table in step.block_tables.items() if tables.get(seq_id) != table},
                "cached": [sorted(step.cached_blocks - cached), sorted(cached - step.cached_blocks)],
            }
        )
        tables, cached = step.block_tables, step.cached_blocks
    return {
        "num_blocks": trace.num_blocks,
        "block_size": trace.block_size,
        "step_width": _step_width(trace),
        "steps": steps,
    }


# --- the picture ---


def _step_width(trace: ScheduleTrace) -> int:
    return max(MIN_STEP_WIDTH, min(MAX_STEP_WIDTH, WISHED_WIDTH // len(trace.steps)))


def _picture(trace: ScheduleTrace) -> str:
    """The picture. From the top: blocks, tokens, one row a sequence, numbers of steps."""
    step_width, seq_ids = _step_width(trace), trace.seq_ids
    rows_top = 2 * (BAND_HEIGHT + BAND_GAP)
    rows_bottom = rows_top + len(seq_ids) * ROW_HEIGHT
    width, height = len(trace.steps) * step_width, rows_bottom + AXIS_HEIGHT
    shapes = _bars(trace, step_width)
    for row, seq_id in enumerate(seq_ids):
        shapes += _row(trace, seq_id, rows_top + row * ROW_HEIGHT, step_width)
    shapes.append(f'<rect id="cursor" x="0" y="0" width="{step_width}" height="{rows_bottom}"/>')
    for index in range(0, len(trace.steps), -(-MIN_TICK_DISTANCE // step_width)):
        shapes.append(f'<text class="tick" x="{index * step_width}" y="{height - 5}">{index}</text>')
    label = f"{len(seq_ids)} sequences over {len(trace.steps)} steps"
    return (
        f'<svg id="picture" role="img" aria-label="{label}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(shapes)}</svg>'
    )


def _bars(trace: ScheduleTrace, step_width: int) -> list[str]:
    """Blocks (owned, and cached without an owner on top of them) and tokens of each step."""
    shapes = []
    most_blocks, most_tokens = max(_most_blocks(trace), 1), _most_tokens(trace)
    tokens_bottom = 2 * BAND_HEIGHT + BAND_GAP
    for index, step in enumerate(trace.steps):
        x = index * step_width
        owned = BAND_HEIGHT * step.num_owned_blocks / most_blocks
        cached = BAND_HEIGHT * len(step.cached_blocks) / most_blocks
        tokens = BAND_HEIGHT * step.num_tokens / most_tokens
        kind = "prefill" if step.is_prefill else "decode"
        shapes.append(_rect("owned", x, BAND_HEIGHT - owned, step_width, owned))
        shapes.append(_rect("cached", x, BAND_HEIGHT - owned - cached, step_width, cached))
        shapes.append(_rect(kind, x, tokens_bottom - tokens, step_width, tokens))
    return shapes


def _row(trace: ScheduleTrace, seq_id: int, top: int, step_width: int) -> list[str]:
    """The spans of a sequence, a mark where the prefix cache held tokens of it, one where it was preempted, its end."""
    shapes = []
    for state, first, last in spans_of(trace, seq_id):
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        title = f"request {seq_id}, {steps}: {state}"
        if state == "prefill":
            position, number = trace.steps[first].computed[seq_id]
            title += f", {_tokens(number)} from position {position}"
        x, width = first * step_width, (last - first + 1) * step_width - 1
        shapes.append(_rect(state, x, top + 2, width, ROW_HEIGHT - 4, title))
    for index, step in enumerate(trace.steps):
        x = index * step_width
        if step.admitted.get(seq_id):
            title = f"request {seq_id}, step {index}: {_tokens(step.admitted[seq_id])} found in the prefix cache"
            shapes.append(_rect("hit", x, top + 2, step_width - 1, 5, title))
        if seq_id in step.preempted:
            title = f"request {seq_id}: preempted in step {index}"
            shapes.append(_rect("preemption", x, top, min(step_width, 4), ROW_HEIGHT, title))
        if seq_id in step.finished:
            title = f"request {seq_id}: ends with step {index} ({step.finished[seq_id]})"
            shapes.append(_rect("end", x + step_width - 3, top + 2, 2, ROW_HEIGHT - 4, title))
    return shapes


def _tokens(number: int) -> str:
    return "1 token" if number == 1 else f"{number} tokens"


def _rect(kind: str, x: float, y: float, width: float, height: float, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}">{inside}</rect>'
