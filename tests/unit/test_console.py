"""Standard streams of the command line: no encoding, closed stream or full disk costs a result or shows a traceback.

No signal that ends a command is lost.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm import cli
from nanovllm.console import exit_on_sigterm, lossless_console, read_lines_from_stdin, typed_lines
from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.source_tree import ROOT

SMALL = ["--max-tokens", "4", "--greedy", "--max-model-len", "64", "--device", "cpu"]
TEXT = "你好 naïve 🙂"


def stream(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def written(text_stream: io.TextIOWrapper) -> bytes:
    text_stream.flush()
    return text_stream.buffer.getvalue()  # type: ignore[attr-defined]


def run_shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`command` in sh, in which $N is the command `nanovllm generate` with options that make it quick."""
    n = f"{sys.executable} -m nanovllm generate {' '.join(SMALL)}"
    variables = {**os.environ, "N": n, **environment}
    return subprocess.run(["sh", "-c", command], cwd=ROOT, env=variables, capture_output=True, timeout=HANG_SECONDS)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_every_result_is_printed_whatever_the_encoding_lacks(encoding, options, monkeypatch) -> None:
    """D85: prompts are echoed, and came after everything was computed."""
    out, err = stream(encoding), stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    prompts = ["In the", TEXT]
    assert cli.main(["generate", *SMALL, *options, *prompts]) == 0
    assert out.errors == "strict", "main() restores the error handler of its caller's stream"
    lines = written(out).decode(encoding).splitlines()
    if options:
        assert [json.loads(line)["prompt"] for line in lines] == prompts
        assert written(out).isascii()
    else:
        shown = TEXT.encode(encoding, "backslashreplace").decode(encoding)
        assert [line for line in lines if line.startswith(">>> ")] == [">>> In the", f">>> {shown}"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_refusal_is_printed_whatever_the_encoding_lacks(encoding, monkeypatch) -> None:
    """D85"""
    err = stream(encoding)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main(["generate", "--model", f"/{TEXT}", "x"]) == 2
    assert rb"got '/\u4f60\u597d na" in written(err)


def test_a_lone_surrogate_is_printed_as_an_escape(monkeypatch) -> None:
    """D85: the error handler surrogateescape of LANG=C would write it as a byte that is no text."""
    out = stream("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdout", out)
    with lossless_console():
        print("a\udcff")
    assert written(out) == b"a\\udcff\n"


def lines_of_a_chat() -> list[str]:
    return list(typed_lines(""))


@pytest.mark.parametrize(
    ("read", "stdin", "message"),
    [
        (read_lines_from_stdin, None, "standard input, and it is closed; give prompts as arguments"),
        (read_lines_from_stdin, io.StringIO("\n"), "there was none"),
        (lines_of_a_chat, None, "and it is closed; redirect it from a file"),
    ],
)
def test_a_closed_and_an_empty_stdin_are_refused(read: Any, stdin: Any, message: str, monkeypatch) -> None:
    """D92"""
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ValueError, match=message):
        read()


@pytest.mark.parametrize("read", [read_lines_from_stdin, lines_of_a_chat])
def test_a_byte_order_mark_is_no_part_of_the_first_line(read: Any, monkeypatch) -> None:
    """Programs on Windows begin a file with it, and it would become tokens of the prompt."""
    data = "\ufefffirst\nsecond\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert read() == ["first", "second"]


@pytest.mark.parametrize("read", [read_lines_from_stdin, lines_of_a_chat])
@pytest.mark.parametrize(("errors", "byte"), [("strict", "0xe9"), ("surrogateescape", "0xe9 in line 2")])
def test_stdin_of_another_encoding_is_refused_with_a_remedy_that_works(read: Any, errors, byte, monkeypatch) -> None:
    """D85, D93"""
    data = "first\ncafé\n".encode("latin-1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors))
    with pytest.raises(
        ValueError, match=rf"must be text in utf-8, and .*{byte} .*for example PYTHONIOENCODING=latin-1"
    ):
        read()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    assert read() == ["first", "café"]


def test_real_streams_that_are_closed_or_full() -> None:
    """D85, D92: one line and exit code 2, also from the interpreter's own flush at exit."""
    cases = {
        "$N In >&-": b"standard output must be open",
        "$N - <&-": b"standard input, and it is closed",
        "$N In the > /dev/full": b"No space left on device",
    }
    for command, words in cases.items():
        result = run_shell(command)
        assert result.returncode == 2, (command, result.stderr)
        assert words in result.stderr.splitlines()[-1]
        assert b"Traceback" not in result.stderr
        assert b"Exception ignored" not in result.stderr
    for command in ("$N In 2>&-", "$N In 2>/dev/full", "{ $N In 2>&1 >&3 | true; echo >&3; } 3>&1 | head -1"):
        result = run_shell(command)
        assert (result.returncode, result.stdout.count(b"\n")) == (0, 1), "a result needs no stderr, nor mixes with it"
        assert len(result.stdout) > 1, (command, result.stderr)


def test_a_stderr_that_cannot_be_written_is_no_error(monkeypatch) -> None:
    """A full disk or a closed pipe at stderr costs messages, and not the result that is computed meanwhile."""
    with open("/dev/full", "w") as full:  # closing it raises, if its buffer still holds something
        monkeypatch.setattr(sys, "stderr", full)
        with lossless_console():
            print("lost", file=sys.stderr, flush=True)
            print("lost too", file=sys.stderr, flush=True)
        assert sys.stderr is full


class CallsWhenFreed:
    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def __del__(self) -> None:
        self.call()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_arrives_in_a_del_is_not_lost(
    number: int, error: type[BaseException], ctrl_c_raises: None
) -> None:
    """Python ignores exceptions that are raised there."""

    @exit_on_sigterm()
    def command() -> None:
        CallsWhenFreed(lambda: signal.raise_signal(number))
        wait_until(lambda: False, "the signal is sent again")

    with pytest.raises(error):
        command()


def test_other_ignored_exceptions_go_to_the_hook_that_was_set_before(monkeypatch) -> None:
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hook_args: ignored.append(hook_args.exc_type))
    hook = sys.unraisablehook
    with exit_on_sigterm():
        CallsWhenFreed(lambda: int("x"))
    assert ignored == [ValueError]
    assert sys.unraisablehook is hook
