"""Trace files: what is written is what is read, and what a person sees who names another file."""

import json
from pathlib import Path

import pytest

from tests.replay.make_corpus import CORPUS
from tests.replay.trace import Trace, TraceError

EVICTION = CORPUS / "eviction.jsonl"


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    trace = Trace.load(EVICTION)
    trace.failure = {"failed": "tests/x.py::test_x[π]", "error": "AssertionError: a\nb"}
    trace.save(tmp_path / "new" / "trace.jsonl")
    assert Trace.load(tmp_path / "new" / "trace.jsonl") == trace


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a trace: its first line"),
        (b"[1, 2]\n", "is not a trace: its first line"),
        (b'{"some": "json"}\n{"end": 1}\n', "is not a trace: its first line"),
        (b"# a text\n", "is not a trace: its first line"),
        (b"\xff\xfe\x00\x01", "is not a trace: it is not text"),
        (b'{"nanovllm_trace": 2}\n{"end": 1}\n', "is a trace of version 2, and this checkout replays version 1"),
        (b'{"nanovllm_trace": 1}\n{"end": 1}\n', "line 1 lacks caveat, engine, hashes, scheduler"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TraceError, match=message):
        Trace.load(tmp_path / "file")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read the trace .*nothing: No such file"):
        Trace.load(tmp_path / "nothing")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_trace_that_is_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    content = EVICTION.read_bytes()
    (tmp_path / "file").write_bytes(content[: int(share * len(content))])
    with pytest.raises(TraceError, match="is cut off or edited"):
        Trace.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not a JSON object"),
        ('{"do": "dance"}', "line 3 has no event 'dance'; there are add, schedule"),
        ('{"do": "add", "seq": 1}', "line 3 lacks params, prompt, seed"),
        ('{"do": "abort", "seq": 1}', "line 3 lacks found"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    lines = EVICTION.read_text().splitlines()
    lines[2] = line
    (tmp_path / "file").write_text("\n".join(lines))
    with pytest.raises(TraceError, match=message):
        Trace.load(tmp_path / "file")


def test_a_trace_is_one_json_object_a_line() -> None:
    assert all(isinstance(json.loads(line), dict) for line in EVICTION.read_text().splitlines())
