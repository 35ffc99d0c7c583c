"""Message queue from rank 0 to the other ranks of its machine, through one shared-memory segment.

    rank 0                                     each other rank
    slot_free.acquire(), of every reader       items_available.acquire()
    write the header and a chunk               copy the chunk
    items_available.release(), of each         slot_free.release()

A message longer than the segment is sent in chunks. The operating system chooses the segment's name, and only rank 0
unlinks it. The signals are semaphores: multiprocessing.Event.set() waits until each waiting process has woken up, so it
does not return once a waiting process was killed. Releasing a semaphore never blocks.
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
CHUNK_BYTES = 2**20  # capacity of the segment; a decode step of 256 sequences takes less than 64 KiB
CHECK_INTERVAL_S = 0.05
_HEADER = struct.Struct("<Q")  # bytes left of the message, this chunk included


def encode(message: object) -> bytes:
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


class MessageQueueReader:
    """One rank's end of the queue. It is pickled into the rank's process when that is spawned."""

    def __init__(self, segment: SharedMemory, context: BaseContext, chunk_bytes: int) -> None:
        self._segment = segment
        self._chunk_bytes = chunk_bytes
        self.items_available = context.Semaphore(0)
        self.slot_free = context.Semaphore(1)

    def dequeue(self) -> Any:
        """The next message, in the order of sending. Blocks until there is one."""
        data, buffer = bytearray(), _buffer(self._segment)
        while True:
            self.items_available.acquire()
            (num_left,) = _HEADER.unpack_from(buffer)
            num_bytes = min(num_left, self._chunk_bytes)
            data += buffer[_HEADER.size : _HEADER.size + num_bytes]
            self.slot_free.release()
            if num_bytes == num_left:
                return pickle.loads(data)


class MessageQueueWriter:
    """Rank 0's end of the queue. Call close() when the readers' processes have ended.

    Raises ValueError, and leaves nothing behind, when /dev/shm is too small or full for the segment and the semaphores.
    """

    def __init__(self, num_readers: int, context: BaseContext, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        with _shm_shortage(_HEADER.size + chunk_bytes):
            self._segment = SharedMemory(create=True, size=_HEADER.size + chunk_bytes)
            try:
                _reserve(self._segment)
                self.readers = [MessageQueueReader(self._segment, context, chunk_bytes) for _ in range(num_readers)]
            except BaseException:
                self._segment.close()
                self._segment.unlink()
                raise

    def enqueue(self, message: object, check: Callable[[], None]) -> None:
        """Returns when the last chunk is written.

        check: called every CHECK_INTERVAL_S while a reader has not copied the previous chunk; an exception from it ends
            the waiting, and the queue must not be used afterwards.
        """
        data, buffer = memoryview(encode(message)), _buffer(self._segment)
        for start in range(0, len(data), self._chunk_bytes):
            chunk = data[start : start + self._chunk_bytes]
            for reader in self.readers:
                while not reader.slot_free.acquire(timeout=CHECK_INTERVAL_S):
                    check()
            _HEADER.pack_into(buffer, 0, len(data) - start)
            buffer[_HEADER.size : _HEADER.size + len(chunk)] = chunk
            for reader in self.readers:
                reader.items_available.release()

    def close(self) -> None:
        """Free the segment; the semaphores are freed with their last reference."""
        self.readers.clear()
        self._segment.close()
        self._segment.unlink()


def _buffer(segment: SharedMemory) -> memoryview:
    assert segment.buf is not None, "the segment is closed"
    return segment.buf


def _reserve(segment: SharedMemory) -> None:
    """Allocate the segment's pages now. Raises OSError. Without it a page is allocated at the first write to it, and
    when none is left, SIGBUS ends the process.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(segment._fd, 0, segment.size)  # type: ignore[attr-defined]


@contextmanager
def _shm_shortage(num_bytes: int) -> Iterator[None]:
    """Converts an OSError about too little space in /dev/shm into a ValueError with the numbers and the remedy."""
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
