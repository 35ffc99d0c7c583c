"""The page of a trace: its spans, its picture and its data say what the trace says, and it needs no other file."""

import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from nanovllm.outputs import RequestOutput
from nanovllm.schedule_trace import ScheduleTrace, recording
from nanovllm.trace_page import Span, spans_of, trace_page
from tests.support.scheduling import add_prompt, make_scheduler, run, step

PROMPT = '</script> & "quotes" <b>@@data@@</b>'


@pytest.fixture(scope="module")
def trace() -> ScheduleTrace:
    """Three sequences, two of them at a time, in six blocks of four tokens: preemption, hits and evictions."""
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_num_seqs=2, max_model_len=20)
    for seq_id in range(3):
        add_prompt(scheduler, 5, seq_id, max_tokens=9)
    with recording(scheduler) as trace:
        run(scheduler)
    assert trace.num_preemptions
    assert trace.num_hit_tokens
    assert any(s.num_evictions for s in trace.steps)
    return trace


@pytest.fixture(scope="module")
def page(trace: ScheduleTrace) -> str:
    outputs = [
        RequestOutput(text="text", token_ids=[1], finish_reason="length", num_cached_tokens=0, seq_id=seq_id)
        for seq_id in trace.seq_ids
    ]
    return trace_page(trace, [PROMPT] * len(outputs), outputs, "a <model>")


@pytest.fixture(scope="module")
def picture(page: str) -> ElementTree.Element:
    found = re.search(r'<svg id="picture".*?</svg>', page, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


def rects(picture: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [rect for rect in picture.iter("rect") if rect.get("class") == kind]


# --- spans ---


def test_spans_say_what_a_sequence_did_in_each_step() -> None:
    """Sequence 0 decodes; then the chunks of the longer one have priority, and sequence 2 has no seat until 0 ends."""
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=2)
    add_prompt(scheduler, 2, 0, max_tokens=3)
    with recording(scheduler) as trace:
        for _ in range(2):
            step(scheduler)
        add_prompt(scheduler, 7, 1, max_tokens=2)
        add_prompt(scheduler, 3, 2, max_tokens=1)
        run(scheduler)
    assert spans_of(trace, 0) == [Span("prefill", 0, 0), Span("decode", 1, 1), Span("idle", 2, 3), Span("decode", 4, 4)]
    assert spans_of(trace, 1) == [Span("prefill", 2, 2), Span("prefill", 3, 3), Span("decode", 4, 4)]
    assert spans_of(trace, 2) == [Span("waiting", 2, 4), Span("prefill", 5, 5)]


def test_a_preempted_sequence_waits_again_between_its_preemption_and_its_readmission(trace) -> None:
    (index,) = [index for index, s in enumerate(trace.steps) if 1 in s.preempted]
    states = {span.state: span for span in spans_of(trace, 1)}
    assert states["preempted"].first == index
    assert trace.steps[states["preempted"].last + 1].admitted.keys() >= {1}


def test_spans_do_not_overlap_and_cover_every_step_in_which_a_sequence_is_queued(trace) -> None:
    for seq_id in trace.seq_ids:
        covered = [index for span in spans_of(trace, seq_id) for index in range(span.first, span.last + 1)]
        queued = [index for index, s in enumerate(trace.steps) if seq_id in (*s.running, *s.waiting)]
        assert covered == queued


# --- the picture ---


def test_the_picture_has_a_mark_for_each_event(trace, picture) -> None:
    assert len(rects(picture, "preemption")) == trace.num_preemptions
    assert len(rects(picture, "hit")) == sum(found > 0 for s in trace.steps for found in s.admitted.values())
    assert len(rects(picture, "end")) == len(trace.seq_ids)
    assert len(rects(picture, "owned")) == len(rects(picture, "cached")) == len(trace.steps)


def test_every_shape_is_inside_the_picture(picture) -> None:
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    for rect in picture.iter("rect"):
        x, y, w, h = (float(rect.get(name, -1)) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width, ElementTree.tostring(rect)
        assert 0 <= y <= y + h <= height, ElementTree.tostring(rect)


# --- the page ---


def scripts(page: str) -> list[str]:
    """The texts of its script elements. A browser too ends one at the first `</script>`, whatever is around it."""
    return re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)


def test_the_page_needs_no_other_file(page) -> None:
    assert not re.search(r"\s(src|href|srcset|data)=|https?:|@import|url\(|import\(|fetch\(", page)


def test_a_prompt_is_shown_as_text_whatever_it_holds(page) -> None:
    assert len(scripts(page)) == page.count("<script") == 2
    assert json.loads(scripts(page)[0])["requests"]["0"]["prompt"] == PROMPT
    assert page.count("<b>@@data@@</b>") == 0
    assert "a &lt;model&gt;" in page


def test_the_script_reads_only_ids_that_the_page_has(page) -> None:
    assert set(re.findall(r'(?:byId|getElementById)\("([\w-]+)"\)', page)) <= set(re.findall(r'\sid="([^"]*)"', page))


def test_the_changes_in_its_data_add_up_to_the_tables_and_cached_blocks_of_each_step(trace, page) -> None:
    data: dict[str, Any] = json.loads(scripts(page)[0])
    tables: dict[str, list[int]] = {}
    cached: set[int] = set()
    for traced, given in zip(trace.steps, data["steps"], strict=True):
        tables |= given["tables"]
        cached = (cached | set(given["cached"][0])) - set(given["cached"][1])
        running = {str(seq_id): list(table) for seq_id, table in traced.block_tables.items()}
        assert {seq_id: tables[seq_id] for seq_id in running} == running
        assert cached == traced.cached_blocks
        assert given["computed"] == {str(seq_id): list(pair) for seq_id, pair in traced.computed.items()}


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="must have at least one step to be drawn"):
        trace_page(ScheduleTrace(4, 4), [], [], "")
