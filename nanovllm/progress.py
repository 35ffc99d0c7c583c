"""Progress: a bar that fits the terminal, or a line every ten seconds if standard error is a file or a pipe.

Nothing is shown with is_shown=False and with a closed standard error, or one that cannot be written (a full disk, a
closed terminal). After an exception, the bar is removed.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from tqdm.auto import tqdm as auto_tqdm
from tqdm.std import tqdm

SECONDS_BETWEEN_LINES = 10.0
MIN_BAR_COLUMNS = 4  # a narrower bar is left out
DEFAULT_COLUMNS = 80  # if the width of the terminal is not known
_HAS_WIDGETS = auto_tqdm.__module__ == "tqdm.auto"  # in a notebook, where standard error is not a terminal


class Progress:
    """Counts to `total` and shows the progress. Use it in a `with` statement.

    what: a title such as "Loading weights".
    is_last_line_wanted: whether a file gets a last line even if all took less than SECONDS_BETWEEN_LINES.
    """

    def __init__(self, what: str, total: int, is_shown: bool = True, is_last_line_wanted: bool = False) -> None:
        self.what = what
        self.total = total
        self.n = 0
        self._start = self._last_line = monotonic()
        self._is_line_wanted = is_last_line_wanted
        self._bar: Any = None
        self._writes_lines = False
        if not is_shown or sys.stderr is None:
            return
        if _HAS_WIDGETS:
            self._bar = auto_tqdm(desc=what, total=total)
        elif sys.stderr.isatty():
            with suppress(OSError):
                self._bar = _TerminalBar(self)
        else:
            self._writes_lines = True

    def update(self, n: int = 1) -> None:
        """Count n more."""
        self.n += n
        with suppress(OSError):
            if self._bar is not None:
                if _HAS_WIDGETS:
                    self._bar.set_postfix_str(self.count() + self.details()[0], refresh=False)
                self._bar.update(n)
            elif self._writes_lines and monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line, self._is_line_wanted = monotonic(), True
                self._write_line()

    def details(self) -> Sequence[str]:
        """Texts to follow the count, longest first. A terminal shows the first one that fits, a file the first one."""
        return [""]

    def count(self) -> str:
        """The progress as text."""
        return f"{self.n}/{self.total}"

    def _write_line(self) -> None:
        seconds = int(monotonic() - self._start)
        print(f"{self.what}: {self.count()} in {seconds} s{self.details()[0]}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError):
            if self._bar is not None:
                self._bar.leave = kind is None
                self._bar.close()
            elif self._writes_lines and kind is None and self._is_line_wanted:
                self._write_line()


class _TerminalBar(tqdm):
    """tqdm's bar in one line that is never cut off. If it does not fit, details are left out, and then the bar."""

    monitor_interval = 0  # no thread: the engine updates often enough

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        super().__init__(total=progress.total, file=sys.stderr, dynamic_ncols=True, miniters=1)

    def __str__(self) -> str:
        values = self.format_dict
        columns = (values["ncols"] or DEFAULT_COLUMNS) - 1  # some terminals wrap when the last column is written
        values["ncols"] = columns
        what, count = f"{self._progress.what}: ", self._progress.count() + " {percentage:3.0f}%"
        details = self._progress.details()
        forms = [(start, "|{bar}| ", detail) for detail in details for start in (what, "")]
        forms += [("", " ", detail) for detail in details]
        text = ""
        for start, bar, detail in forms:
            form = f"{start}{count}{bar}{{elapsed}}<{{remaining}}{detail}"
            text = self.format_meter(**{**values, "bar_format": form.replace("{bar}", "")})
            if len(text) + (MIN_BAR_COLUMNS if "{bar}" in bar else 0) <= columns:
                return self.format_meter(**{**values, "bar_format": form})
        return text[:columns]
