"""Limits of the child process that runs a target: time, memory, files, no network. A copy of its source."""

import ctypes
import functools
import gc
import os
import resource
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CALL_SECONDS = 0.5  # of CPU time for one call of the target, which takes less than a millisecond
SHORT_CALL_SECONDS = 0.02  # the same, once it is known that some calls hang, and while a scenario is shrunk
MEMORY_BYTES = 2 * 2**30  # more than the process has when it starts
FILE_BYTES = 2**20
MAX_COPIED_BYTES = 2**20  # of one file
SKIPPED = {"node_modules", "site-packages", "venv", "__pycache__"}
COPIED = {".py", ".json", ".toml"}
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # clone(2)


class Hang(BaseException):
    """A call of the target used up its time. A BaseException, since targets catch Exception."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise Hang in a body that uses more CPU time. For the main thread."""
    _watch_time()
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)  # again after that, if a bare except has swallowed it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@functools.cache  # once, since a call of the target takes less time than this one
def _watch_time() -> None:
    signal.signal(signal.SIGPROF, _raise_hang)


def _raise_hang(number: int, frame: Any) -> None:
    raise Hang("does not return")


def confine(folder: str) -> None:
    """Limit this process, which is a child that runs a target: memory, files, network. It works in `folder`."""
    gc.freeze()  # to collect what torch holds takes longer than SHORT_CALL_SECONDS
    with suppress(OSError):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, AttributeError):  # refused by some kernels' settings; the next line is left then
        ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK)
    for name in ("connect", "connect_ex", "bind", "sendto"):
        setattr(socket.socket, name, _refuse_network)
    socket.getaddrinfo = _refuse_network
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder


def _refuse_network(*args: Any, **options: Any) -> Any:
    raise OSError("the target has no network here")


def copy_source(root: Path, folder: Path) -> Path:
    """A copy of the checkout's source in `folder`, so that the target cannot write to the original."""
    copy = folder / root.name
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".") and name not in SKIPPED]
        for name in files:
            source = Path(directory) / name
            if source.suffix in COPIED and source.is_file() and source.stat().st_size <= MAX_COPIED_BYTES:
                target = copy / source.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    return copy
