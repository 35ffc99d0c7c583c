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

import pickle
import struct
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.shared_memory import SharedMemory
from typing import Any

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
    """Rank 0's end. Call close() when the receivers' processes have ended."""

    def __init__(self, num_receivers: int, context: BaseContext, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._segment = SharedMemory(create=True, size=_HEADER.size + capacity)
        self.receivers = [ShmReceiver(self._segment, context, capacity) for _ in range(num_receivers)]

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
