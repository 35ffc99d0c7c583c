"""The system resources of this process, so that a test can check that an engine left nothing behind."""

import gc
import multiprocessing
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil

SHARED_MEMORY = Path("/dev/shm")


class ResourceSnapshot(NamedTuple):
    """Child processes (all levels), shared-memory segments and semaphores, open files and sockets, temporary files, and
    threads (but tqdm's, one for the whole process).
    """

    processes: frozenset[int]
    segments: frozenset[str]
    num_files: int
    temporary: frozenset[str]
    threads: frozenset[str]


class Watch:
    """Gives the resources that engines make a prefix of their own, since other programs use the machine too."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prefix = "nv" + secrets.token_hex(3)  # Python accepts no longer one

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        resource_tracker.ensure_running()  # one process for the whole run
        config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
        with (
            mock.patch.object(shared_memory, "_SHM_NAME_PREFIX", f"/{self.prefix}"),
            mock.patch.dict(config, semprefix=f"/{self.prefix}"),  # workers inherit it
            mock.patch.object(tempfile, "tempdir", str(self.directory)),
        ):
            yield self

    def snapshot(self) -> ResourceSnapshot:
        for _ in range(2):  # the second round collects what the finalizer of an engine in a cycle freed
            gc.collect()
        tracker = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
        children = psutil.Process().children(recursive=True)
        return ResourceSnapshot(
            processes=frozenset(child.pid for child in children if child.pid != tracker),
            segments=frozenset(path.name for path in SHARED_MEMORY.iterdir() if self.prefix in path.name),
            num_files=len(os.listdir("/proc/self/fd")),
            temporary=frozenset(os.listdir(self.directory)),
            threads=frozenset(thread.name for thread in threading.enumerate() if thread.name != "tqdm_monitor"),
        )
