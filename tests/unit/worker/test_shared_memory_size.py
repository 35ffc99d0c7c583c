"""A /dev/shm that is too small, full or absent is an error at start-up, and no SIGBUS later."""

import errno
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

from nanovllm.worker import shm_channel
from nanovllm.worker.shm_channel import CAPACITY, ShmSender
from tests.support.limits import HANG_SECONDS
from tests.support.source_tree import ROOT

SPAWN = multiprocessing.get_context("spawn")
SMALL = """
import os
from multiprocessing import get_context
from nanovllm.worker.shm_channel import ShmSender
try:
    ShmSender(1, get_context("spawn"))
except ValueError as error:
    print(error)
print(os.listdir("/dev/shm"))
"""


def names() -> set[str]:
    return set(os.listdir(shm_channel.SHM_DIRECTORY))


def test_the_segment_is_reserved_when_it_is_made() -> None:
    """D88: each page is there before it is written."""
    sender = ShmSender(1, SPAWN)
    try:
        assert os.fstat(sender._segment._fd).st_blocks * 512 >= CAPACITY  # type: ignore[attr-defined]
    finally:
        sender.close()


def test_without_room_the_error_names_what_is_needed_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """D88: and nothing is left."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Stats:
        f_frsize, f_bavail, f_blocks = 4096, 4, 16 * 256

    before = names()
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "statvfs", lambda _: Stats)
    with pytest.raises(ValueError, match=r"1\.0 MiB .* /dev/shm .* got 0\.02 of 16\.00 MiB free .*--shm-size=1g"):
        ShmSender(1, SPAWN)
    assert names() == before


def test_without_room_for_semaphores_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """D88."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = names()
    monkeypatch.setattr(shm_channel, "ShmReceiver", full)
    with pytest.raises(ValueError, match=r"/dev/shm .*--shm-size"):
        ShmSender(1, SPAWN)
    assert names() == before


def test_a_system_without_shared_memory_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """D88."""

    def absent(**_: Any) -> SharedMemory:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(shm_channel, "SharedMemory", absent)
    monkeypatch.setattr(shm_channel, "SHM_DIRECTORY", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"got no such file system: No such file"):
        ShmSender(1, SPAWN)


def test_another_error_of_the_system_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files has nothing to do with the size of /dev/shm."""

    def fail(**_: Any) -> SharedMemory:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(shm_channel, "SharedMemory", fail)
    with pytest.raises(OSError, match="Too many open files"):
        ShmSender(1, SPAWN)


def test_a_real_small_file_system() -> None:
    """D88: of 16 KiB, in a mount namespace of its own."""
    command = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$0" -c "$1"'
    enter = ["unshare", "--mount", "--map-root-user", "sh", "-c", command]
    if not can_mount():
        pytest.skip("needs a mount namespace of its own")
    result = subprocess.run(
        [*enter, sys.executable, SMALL], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip
    message, left = result.stdout.splitlines()
    assert message.startswith("several ranks need 1.0 MiB of shared memory in /dev/shm for their messages, got 0.02 of")
    assert (result.returncode, left, result.stderr) == (0, "[]", "")


def can_mount() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", shm_channel.SHM_DIRECTORY]
    try:
        return subprocess.run(command, capture_output=True, timeout=HANG_SECONDS).returncode == 0
    except FileNotFoundError:
        return False
