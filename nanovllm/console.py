"""Standard streams of the command line: no result is lost because a console cannot show it."""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO, cast

# Exit codes: 128 and the number of the signal, as shells report it.
INTERRUPTED = 130  # SIGINT
TERMINATED = 143  # SIGTERM

BYTE_ORDER_MARK = "\ufeff"  # some programs begin a file of UTF-8 with it


@contextmanager
def lossless_console() -> Iterator[None]:
    r"""While a command runs, stdout and stderr write a character that their encoding lacks as an escape such as \u4f60.

    Windows' cp1252, LANG=C and some pipes lack most characters; Python's default is to raise UnicodeEncodeError.
    A closed stderr is replaced by the null device: print(file=None) would write messages among the results. Messages
    that stderr cannot take (a full disk, a closed pipe) are discarded.
    """
    with ExitStack() as restore:
        restore.callback(setattr, sys, "stderr", sys.stderr)
        if sys.stderr is None:
            sys.stderr = restore.enter_context(open(os.devnull, "w"))
        streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
        for stream in streams:
            if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":  # a StringIO has no encoding
                restore.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        sys.stderr = cast(TextIO, _Messages(sys.stderr))
        yield


class _Messages:
    """Standard error, which the null device replaces at the first write that fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def require_stdout() -> None:
    """Raise ValueError if standard output is closed, before anything is computed for it."""
    if sys.stdout is None:
        raise ValueError(
            "standard output must be open, since results go there, and it is closed; redirect it to a file"
        )


def read_lines_from_stdin() -> list[str]:
    """The lines of standard input that are not blank, without their line ends.

    Raises ValueError when it is closed, holds nothing, or holds bytes that are no text in its encoding.
    """
    if sys.stdin is None:
        raise ValueError("'-' reads one prompt a line from standard input, and it is closed; give prompts as arguments")
    lines = [line.rstrip("\r\n") for line in _decoded(sys.stdin) if line.strip()]
    if not lines:
        raise ValueError("'-' reads one prompt a line from standard input, and there was none")
    return lines


def typed_lines(prompt: str) -> Iterator[str]:
    """Show `prompt` and yield a line of standard input without its end, again and again. Raises ValueError as above."""
    if sys.stdin is None:
        raise ValueError("messages are read from standard input, one a line, and it is closed; redirect it from a file")
    with suppress(EOFError):
        yield from _decoded(iter(lambda: input(prompt), None))


def _decoded(lines: Iterable[str]) -> Iterator[str]:
    try:
        for number, line in enumerate(lines, 1):
            undecoded = [character for character in line if "\ud800" <= character <= "\udfff"]
            if undecoded:  # the error handler surrogateescape, as under LANG=C, turns a byte into a lone surrogate
                raise UnicodeError(f"byte 0x{ord(undecoded[0]) & 0xFF:02x} in line {number} cannot be decoded")
            yield line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except UnicodeError as error:  # of a strict decoder, which reads ahead, so the line is unknown
        raise ValueError(
            f"standard input must be text in {sys.stdin.encoding}, and {error}; set PYTHONIOENCODING to the encoding "
            "that it has, for example PYTHONIOENCODING=latin-1"
        ) from error


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """While it is open, SIGTERM raises SystemExit(143): temporary files are removed and child processes are ended.

    Python ignores an exception that is raised in a __del__. There are many while transformers is imported, so SIGTERM
    and Ctrl-C are sent again if their exception was ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(TERMINATED)

    def send_again(ignored: Any) -> None:
        number = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(ignored.exc_type)
        if number is None:
            previous_hook(ignored)
        else:  # in a thread: its exception would be raised in here, and ignored too
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()

    previous, previous_hook = signal.signal(signal.SIGTERM, leave), sys.unraisablehook
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.unraisablehook = previous_hook


def discard(stream: TextIO) -> None:
    """Send what `stream` still buffers to the null device, so that the flush at interpreter exit cannot fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def flush_stdout() -> None:
    """Write what was printed before an error; what a full disk refuses is discarded."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            discard(sys.stdout)
