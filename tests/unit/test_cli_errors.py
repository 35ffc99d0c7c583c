"""What the command line says about each kind of exception: one line with the remedy, or that nanovllm has a bug."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import cli
from nanovllm.cli_errors import BUG, USER_ERROR, as_options, report_error, user_error
from nanovllm.commands.options import option_names
from nanovllm.executor.base import RankError, RankValueError

OPTIONS = option_names(cli._parser().parse_args(["generate", "x"]))
RANK_TRACEBACK = "\n\nIts traceback:\nTraceback (most recent call last):\n  File ..."


def cpu_out_of_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def caught(function: Any, *arguments: Any) -> Exception:
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("no exception was raised")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--gpu-memory-utilization"),
        (MemoryError(), "MemoryError; lower --max-num-batched-tokens"),
        (RankError(f"rank 1 of 2 failed: OutOfMemoryError: CUDA out of memory.{RANK_TRACEBACK}"), "rank 1 of 2 failed"),
        (RankError("rank 1 of 2 was killed by SIGKILL: by a user, or by the system when memory ran out"), "by SIGKILL"),
        (RankValueError(f"rank 1 of 2 failed: ValueError: dtype must be x{RANK_TRACEBACK}"), "dtype must be x"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device (--debug shows where"),
        (PermissionError(errno.EACCES, "Permission denied", "/m/config.json"), "Permission denied: '/m/config.json'"),
        (ImportError("No module named 'torch'"), "No module named 'torch'; install nanovllm"),
        (ValueError("of a\n\n  library\n"), "of a library (--debug shows where this comes from)"),
        (caught(cpu_out_of_memory), "can't allocate memory"),
    ],
)
def test_what_the_user_can_change_is_one_line(error: Exception, words: str, capsys: Any) -> None:
    """D92"""
    assert report_error(error, OPTIONS, is_debug=False) == USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nanovllm: error: ")
    assert words in line


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        TypeError("x"),
        AssertionError(),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RankError(f"rank 1 of 2 failed: KeyError: 'x'{RANK_TRACEBACK}"),
    ],
)
def test_a_bug_says_that_it_is_one_below_its_traceback(error: Exception, capsys: Any) -> None:
    """D92"""
    assert report_error(error, OPTIONS, is_debug=False) == BUG
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"nanovllm: this is a bug in nanovllm ({type(error).__name__}): please report it")


def test_a_current_directory_that_was_removed_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    error = FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert user_error(error, OPTIONS) == "No such file or directory (--debug shows where this comes from)"
    (tmp_path / "removed").mkdir()
    monkeypatch.chdir(tmp_path / "removed")
    (tmp_path / "removed").rmdir()
    assert user_error(error, OPTIONS) == "the current directory must exist, and it was removed; change to another one"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("max_model_len must be 5", "--max-model-len must be 5"),
        ("a prompt must be shorter than max_model_len=64", "a prompt must be shorter than --max-model-len 64"),
        ("attention_backend='triton' also takes", "--attention-backend triton also takes"),
        ("seed must be 5; use None to derive it", "--seed must be 5; leave it out to derive it"),
        ("got 0; use SamplingParams.greedy() for it", "got 0; use --greedy for it"),
        ("lower max_num_seqs or max_model_len", "lower --max-num-seqs or --max-model-len"),
        ("the seed, the stop and the device", None),
        ("got 'max_model_len must be'; check the path", None),
        ('got "it\'s max_model_len"', None),
        ("/tmp/max_model_len/model.json must be a file", None),
        ("/m/seed=3/config.json must be a file", None),
    ],
)
def test_messages_name_options_but_what_they_quote_and_paths_stay(message: str, expected: str | None) -> None:
    """D93. expected: None for what stays as it is."""
    assert as_options(message, OPTIONS) == (expected or message)
