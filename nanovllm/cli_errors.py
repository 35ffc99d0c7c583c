"""Prints an exception for the command line: one line with the remedy, or a traceback if nanovllm has a bug."""

import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

USER_ERROR = 2  # exit code for what the user can change
BUG = 70  # EX_SOFTWARE of sysexits.h

_PACKAGE = str(Path(__file__).parent)
_RANK_TRACEBACK = "\n\nIts traceback:\n"  # separates the parts of RankError's message, see RankFailure.describe
# Advice for Python callers -> the same advice for the command line, which accepts options only.
_PHRASES = {
    "SamplingParams.greedy()": "--greedy",
    "use None": "leave it out",
    "give a list of token ids or add": "add",
    "decode its bytes with the right encoding, or with errors='replace'": "set the locale to the encoding of its bytes",
}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "OutOfMemoryError", "MemoryError")
_LESS_MEMORY = (
    "lower --max-num-batched-tokens, --max-num-seqs, --num-kv-cache-blocks or --gpu-memory-utilization, free memory, "
    "or choose a smaller model"
)


def report_error(error: Exception, options: Mapping[str, str], is_debug: bool) -> int:
    """Print the message for `error` to stderr. Returns the exit code.

    options: field name -> option, such as max_model_len -> --max-model-len, of the command that ran.
    """
    line = user_error(error, options)
    if line is None or is_debug:
        traceback.print_exception(error)
    if line is not None:
        print("nanovllm: error:", line, file=sys.stderr)
        return USER_ERROR
    print(
        f"nanovllm: this is a bug in nanovllm ({type(error).__name__}): please report it with the traceback above",
        file=sys.stderr,
    )
    return BUG


def user_error(error: Exception, options: Mapping[str, str]) -> str | None:
    """One line about an error that the user can correct; None for a bug of nanovllm."""
    text, _, rank_traceback = str(error).partition(_RANK_TRACEBACK)
    text = text if text.strip() else type(error).__name__
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _OUT_OF_MEMORY)
    ):
        return f"{_one_line(text)}; {_LESS_MEMORY}"
    if isinstance(error, ImportError):
        return f"{_one_line(text)}; install nanovllm with what it needs: pip install nanovllm"
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror  # without the number
        if error.filename is not None:
            return f"{text}: {error.filename!r}"
    if isinstance(error, FileNotFoundError) and not _has_current_directory():
        return "the current directory must exist, and it was removed; change to another one"
    # By name, since only engine/ and executor/ import executor/base.
    is_of_a_rank = any(kind.__name__ == "RankError" for kind in type(error).__mro__)
    if not isinstance(error, (ValueError, OSError)) and not (is_of_a_rank and not rank_traceback):
        return None
    if not _is_raised_here(error):
        return f"{_one_line(text)} (--debug shows where this comes from)"
    return as_options(_one_line(text), options)


def as_options(message: str, options: Mapping[str, str]) -> str:
    """Replace field names and advice for Python callers by options. Field names inside quotes ('...') stay."""
    for phrase, replacement in _PHRASES.items():
        message = message.replace(phrase, replacement)
    if not options:
        return message
    names = "|".join(options)
    several_words = "|".join(name for name in options if "_" in name) or "(?!)"
    pattern = (
        rf"(?<![\w./-])(?P<pair>{names})=(?P<value>'[^']*'|[^\s,;:()]+)"
        r"|(?<!\w)'(?:[^'\\]|\\.)*'"
        r'|(?<!\w)"(?:[^"\\]|\\.)*"'
        rf"|(?<![\w./-])(?P<long>{several_words})(?![\w/])"  # not part of a path
        rf"|(?<!\S)(?P<short>{names})(?= must\b)"  # a single word such as seed is a field only before "must"
    )

    def replaced(match: re.Match[str]) -> str:
        if match["pair"]:
            return f"{options[match['pair']]} {match['value'].strip(chr(39))}"
        name = match["long"] or match["short"]
        return options[name] if name else match[0]

    return re.sub(pattern, replaced, message)


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _has_current_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _is_raised_here(error: BaseException) -> bool:
    """Whether code of nanovllm raised `error`, so that its message is written for nanovllm's users."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_PACKAGE)
