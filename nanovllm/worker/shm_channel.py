"""Messages from rank 0 to the other ranks of its machine, through one shared-memory segment.

    rank 0                              each other rank
    wait until all have read            wait until written
    write header and piece
    say "written" to each               copy the piece
                                        say "read"

A message longer than the segment goes in pieces. The segment's name comes from the system, and only rank 0 unlinks it.

What says "written" and "read" is a semaphore, not a multiprocessing.Event: Event.set() takes a lock and waits until
each sleeper has woken up, so it never returns once a waiting process was killed. Releasing a semaphore never waits.
"""

import errno
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.shared_memory import SharedMemory
from typing import Any

SHM_DIRECTORY = "/dev/shm"  # where Linux keeps the segments and semaphores of all processes
CAPACITY = 2**20  # bytes of a piece; a decode step of 256 sequences takes less than 64 KiB
POLL_SECONDS = 0.05  # how often a sender that waits looks after its receivers
_HEADER = struct.Struct("<Q")  # bytes left of the message, this piece included


def encode(message: object) -> bytes:
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


class ShmReceiver:
    """One rank's end; travels to its process as an argument."""

    def __init__(self, segment: SharedMemory, context: BaseContext, capacity: int) -> None:
        self._segment = segment
        self._capacity = capacity
        self.is_written = context.Semaphore(0)
        self.is_read = context.Semaphore(1)

    def receive(self) -> Any:
        """The next message, in the order of sending. Waits for it."""
        data, buffer = bytearray(), _buffer(self._segment)
        while True:
            self.is_written.acquire()
            (num_left,) = _HEADER.unpack_from(buffer)
            num_bytes = min(num_left, self._capacity)
            data += buffer[_HEADER.size : _HEADER.size + num_bytes]
            self.is_read.release()
            if num_bytes == num_left:
                return pickle.loads(data)


class ShmSender:
    """Rank 0's end. Call close() when the receivers' processes have ended.

    Raises ValueError, and leaves nothing, when /dev/shm is too small or full for the segment and the semaphores.
    """

    def __init__(self, num_receivers: int, context: BaseContext, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        with _shm_shortage(_HEADER.size + capacity):
            self._segment = SharedMemory(create=True, size=_HEADER.size + capacity)
            try:
                _reserve(self._segment)
                self.receivers = [ShmReceiver(self._segment, context, capacity) for _ in range(num_receivers)]
            except BaseException:
                self._segment.close()
                self._segment.unlink()
                raise

    def send(self, message: object, check: Callable[[], None]) -> None:
        """Returns when the last piece is written. Calls `check` now and then while receivers are slow to read: an
        exception from it ends the waiting, and the channel's use.
        """
        data, buffer = memoryview(encode(message)), _buffer(self._segment)
        for start in range(0, len(data), self._capacity):
            piece = data[start : start + self._capacity]
            for receiver in self.receivers:
                while not receiver.is_read.acquire(timeout=POLL_SECONDS):
                    check()
            _HEADER.pack_into(buffer, 0, len(data) - start)
            buffer[_HEADER.size : _HEADER.size + len(piece)] = piece
            for receiver in self.receivers:
                receiver.is_written.release()

    def close(self) -> None:
        """Give the segment back to the system; the semaphores go with their last reference."""
        self.receivers.clear()
        self._segment.close()
        self._segment.unlink()


def _buffer(segment: SharedMemory) -> memoryview:
    assert segment.buf is not None, "the segment is closed"
    return segment.buf


def _reserve(segment: SharedMemory) -> None:
    """Take the segment's pages from the system now. Otherwise each is taken when it is first written, and where there
    is none any more, SIGBUS ends the process. Raises OSError.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(segment._fd, 0, segment.size)  # type: ignore[attr-defined]


@contextmanager
def _shm_shortage(num_bytes: int) -> Iterator[None]:
    """Turns an OSError that says what /dev/shm lacks into a ValueError with the numbers and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOMEM):
            raise
        raise ValueError(
            f"several ranks need {num_bytes / 2**20:.1f} MiB of shared memory in {SHM_DIRECTORY} for their messages, "
            f"got {_free_of_size()} ({error.strerror}); enlarge it (docker run --shm-size=1g, or mount -o "
            f"remount,size=1g {SHM_DIRECTORY}; on GPUs NCCL uses it too), or delete old files there"
        ) from error


def _free_of_size() -> str:
    try:
        stats = os.statvfs(SHM_DIRECTORY)
    except OSError as error:
        return f"no such file system: {error.strerror}"
    free, size = (blocks * stats.f_frsize / 2**20 for blocks in (stats.f_bavail, stats.f_blocks))
    return f"{free:.2f} of {size:.2f} MiB free"
