"""Progress: what a terminal of any width, a file and a notebook get; D98."""

import errno
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, bundled_model_path, progress
from nanovllm.engine import throughput
from nanovllm.engine.request_state import RequestState
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import SequenceStatus
from nanovllm.engine.throughput import GenerationProgress
from nanovllm.progress import Progress
from tests.support.scheduling import make_sequence

LINE = re.compile(r"Generating: (\d+)/2 prompts in \d+ s, (\d+) tokens, prefill [\d,]+ tok/s, decode [\d,]+ tok/s")


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """A real terminal as sys.stderr; yields a function that returns what was written since its last call."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    stream = os.fdopen(writer, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)

    def shown() -> list[str]:
        stream.flush()
        os.set_blocking(reader, False)
        data = b""
        with suppress(BlockingIOError):
            while chunk := os.read(reader, 2**16):
                data += chunk
        return re.split(r"[\r\n]+", data.decode())

    try:
        yield shown
    finally:
        monkeypatch.undo()
        stream.close()
        os.close(reader)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress, "monotonic", lambda: self.now)
        monkeypatch.setattr(throughput, "perf_counter", lambda: self.now)


def requests(num_prompts: int, max_tokens: int) -> list[RequestState]:
    sequences = [make_sequence([1] * 3, seq_id=id, max_tokens=max_tokens) for id in range(num_prompts)]
    return [RequestState(seq, None, index) for index, seq in enumerate(sequences)]


def advance(bar: GenerationProgress, advanced: list[RequestState], is_prefill=False, finish=False) -> None:
    for request in advanced:
        request.sequence.append_token(7)
        if finish:
            request.sequence.status = SequenceStatus.FINISHED
    sequences = tuple(request.sequence for request in advanced)
    bar.add(ScheduledBatch(is_prefill, sequences, (1,) * len(sequences), sequences), sequences)


# --- in a file ---


def test_a_file_gets_a_line_in_ten_seconds_and_one_at_the_end(monkeypatch, capsys) -> None:
    """D98: 100 s of steps that take 0.1 s each."""
    clock = Clock(monkeypatch)
    with Progress("Loading weights", 1000) as bar:
        for step in range(1, 1001):
            clock.now = 1000 + step / 10
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:9] == [f"Loading weights: {100 * n}/1000 in {10 * n} s" for n in range(1, 10)]
    assert set(lines[9:]) == {"Loading weights: 1000/1000 in 100 s"}


@pytest.mark.parametrize(
    ("is_last_line_wanted", "error", "num_lines"), [(False, None, 0), (True, None, 1), (True, KeyboardInterrupt, 0)]
)
def test_a_short_run_writes_one_line_if_wanted_and_none_after_an_exception(
    is_last_line_wanted: bool, error: type[BaseException] | None, num_lines: int, capsys
) -> None:
    with suppress(KeyboardInterrupt), Progress("Generating", 2, is_last_line_wanted=is_last_line_wanted) as bar:
        bar.update(2)
        if error:
            raise error
    assert len(capsys.readouterr().err.splitlines()) == num_lines


class Full(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stderr", [None, Full(is_terminal=False), Full(is_terminal=True)])
def test_a_stderr_that_is_closed_or_cannot_be_written_is_no_error(stderr: io.StringIO | None, monkeypatch) -> None:
    """D85, D98: a program keeps what it generates when its log is on a full disk, or its terminal was closed."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress("Generating", 2, is_last_line_wanted=True) as bar:
        bar.update(2)
    assert bar.n == 2


def test_generate_writes_one_line_to_a_file(capsys) -> None:
    with LLM(str(bundled_model_path()), max_model_len=64, device="cpu") as llm:
        capsys.readouterr()
        llm.generate([[5, 6], [7]], SamplingParams(max_tokens=9, ignore_eos=True))
        (line,) = capsys.readouterr().err.splitlines()
        found = LINE.fullmatch(line)
        assert found is not None, line
        assert found.groups() == ("2", "18")
        llm.generate([[5, 6], [7]], use_tqdm=False)
        template = "{{ messages[0]['content'] }}"
        chat = partial(
            llm.chat, [{"role": "user", "content": "b"}], SamplingParams(max_tokens=2), chat_template=template
        )
        chat(use_tqdm=False)
        assert capsys.readouterr().err == ""
        chat()
        assert capsys.readouterr().err.startswith("Generating: ")


# --- on a terminal ---


@pytest.mark.parametrize("columns", [20, 40, 60, 79, 80, 120, 200])
@pytest.mark.parametrize(("num_prompts", "max_tokens"), [(1, 100), (1, 100_000), (32, 100), (10_000, 2)])
def test_nothing_is_cut_off_at_any_width(columns, num_prompts, max_tokens, monkeypatch) -> None:
    """D98: with the largest numbers that a line has to hold."""
    with terminal(columns, monkeypatch) as shown:
        clock = Clock(monkeypatch)
        many = requests(num_prompts, max_tokens)
        with GenerationProgress(many, 10**6, is_shown=True) as bar:
            clock.now += num_prompts / 123_456
            advance(bar, many, is_prefill=True)
            clock.now += num_prompts / 123_456
            advance(bar, many, finish=True)
            bar.finish()
        lines = [line for line in shown() if line.strip()]
    assert max(map(len, lines)) < columns
    if columns >= 60:
        count = f"2/{max_tokens:,} tokens" if num_prompts == 1 else f"{num_prompts:,}/{num_prompts:,} prompts"
        assert f"{count} 100%|" in lines[-1]
    if columns >= 80:
        assert re.search(r"prefill [\d,]+k? decode [\d,]+k? tok/s$|prefill .* tok/s, decode .* tok/s$", lines[-1])


def test_an_exception_leaves_no_bar(monkeypatch) -> None:
    with terminal(80, monkeypatch) as shown:
        with suppress(KeyboardInterrupt), Progress("Loading weights", 10) as bar:
            bar.update()
            raise KeyboardInterrupt
        assert shown()[-2].isspace(), "the last thing written is blanks over the bar, and a carriage return"


def test_a_notebook_gets_the_bar_of_tqdm(monkeypatch) -> None:
    """There, standard error is no terminal, and tqdm.auto makes a widget."""
    made: list[Any] = []

    def widget(**options: Any) -> Any:
        made.append(progress.tqdm(**options, file=io.StringIO()))
        return made[0]

    monkeypatch.setattr(progress, "_HAS_WIDGETS", True)
    monkeypatch.setattr(progress, "auto_tqdm", widget)
    with Progress("Loading weights", 10) as bar:
        bar.update(4)
    assert (made[0].n, made[0].total, made[0].desc) == (4, 10, "Loading weights")
