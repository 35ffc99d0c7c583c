"""Messages through shared memory arrive whole, in order and at any size; a killed reader does not block the writer; a
full or absent /dev/shm is an error with a remedy.
"""

import errno
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nanovllm.distributed import message_queue
from nanovllm.distributed.message_queue import CHUNK_BYTES, MessageQueueReader, MessageQueueWriter, encode
from tests.support.counts import count_comparisons
from tests.support.limits import HANG_SECONDS

SPAWN = multiprocessing.get_context("spawn")


class ReaderEnded(Exception):
    pass


def raise_reader_ended() -> None:
    raise ReaderEnded


def no_check() -> None:
    """For enqueue(), where no reader fails."""


@contextmanager
def queue(num_readers: int = 1, chunk_bytes: int = CHUNK_BYTES) -> Iterator[MessageQueueWriter]:
    writer = MessageQueueWriter(num_readers, SPAWN, chunk_bytes)
    try:
        yield writer
    finally:
        writer.close()


def dequeue_all(reader: MessageQueueReader, count: int) -> list[Any]:
    return [reader.dequeue() for _ in range(count)]


def received_by_each(writer: MessageQueueWriter, messages: list[Any]) -> list[list[Any]]:
    """The messages that each reader, in a thread of its own, gets when `messages` are sent one after the other."""
    results: list[list[Any]] = [[] for _ in writer.readers]

    def run(index: int, reader: MessageQueueReader) -> None:
        results[index] = dequeue_all(reader, len(messages))

    # Daemon threads: if a message never arrives, the test fails, and the end of the run does not wait for the thread.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(writer.readers)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + HANG_SECONDS

    def check() -> None:
        assert time.monotonic() < end, "a reader does not read what was sent"

    for message in messages:
        writer.enqueue(message, check)
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive(), "a reader waits for a message that was sent"
    return results


@given(
    chunk_bytes=st.integers(1, 64),
    num_readers=st.integers(1, 3),
    messages=st.lists(st.binary(max_size=200) | st.integers() | st.none(), min_size=1, max_size=5),
)
def test_every_message_reaches_every_reader_whole_and_in_order(chunk_bytes, num_readers, messages) -> None:
    """D31: of any size. Most of these messages are longer than the segment."""
    with queue(num_readers, chunk_bytes) as writer:
        assert received_by_each(writer, messages) == [messages] * num_readers
    count_comparisons("ranks: messages received against those sent", len(messages) * num_readers)


def test_a_reader_killed_while_it_waits_does_not_block_the_writer() -> None:
    """D33: multiprocessing.Event.set() would wait without end for the killed reader.

    enqueue() writes one more message, and the next one raises ReaderEnded, because no reader frees the slot.
    """
    with queue() as writer:
        process = SPAWN.Process(target=dequeue_all, args=(writer.readers[0], 2))
        process.start()
        writer.enqueue("read", no_check)
        slot_free = writer.readers[0].slot_free
        assert slot_free.acquire(timeout=HANG_SECONDS)  # the reader has read, and waits for the next message
        slot_free.release()
        process.kill()
        process.join(HANG_SECONDS)
        assert process.exitcode == -signal.SIGKILL
        writer.enqueue("written for a dead process", raise_reader_ended)
        with pytest.raises(ReaderEnded):
            writer.enqueue("more", raise_reader_ended)


def test_two_queues_are_independent_and_each_frees_its_segment() -> None:
    """D32. D03: a message is a copy."""
    message = {"tokens": [1, 2, 3]}
    with queue() as first, queue() as second:
        first.enqueue(message, no_check)
        second.enqueue("second", no_check)
        message["tokens"].append(4)
        assert (second.readers[0].dequeue(), first.readers[0].dequeue()) == ("second", {"tokens": [1, 2, 3]})
        names = [writer._segment.name for writer in (first, second)]
    for name in names:
        with pytest.raises(FileNotFoundError):
            SharedMemory(name)
    assert pickle.loads(encode(message)) == message


# --- /dev/shm ---


def raising(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "number", "error", "match"),
    [
        (os, "posix_fallocate", errno.ENOSPC, ValueError, r"1\.0 MiB .* /dev/shm .* got .* MiB free .*--shm-size=1g"),
        (message_queue, "MessageQueueReader", errno.ENOSPC, ValueError, r"/dev/shm .*--shm-size"),
        (message_queue, "SharedMemory", errno.ENOENT, ValueError, r"/dev/shm .*No such file.*--shm-size"),
        (message_queue, "SharedMemory", errno.EMFILE, OSError, "Too many open files"),
    ],
    ids=["no room for the segment", "no room for semaphores", "no /dev/shm", "another error"],
)
def test_an_error_of_the_system_names_the_remedy_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, error: type[Exception], match: str
) -> None:
    """D88."""
    created: list[SharedMemory] = []

    def create(**options: Any) -> SharedMemory:
        created.append(SharedMemory(**options))
        return created[-1]

    monkeypatch.setattr(message_queue, "SharedMemory", create)
    monkeypatch.setattr(owner, name, raising(number))
    with pytest.raises(error, match=match):
        MessageQueueWriter(1, SPAWN)
    assert len(created) == (name != "SharedMemory")
    for segment in created:
        with pytest.raises(FileNotFoundError):
            SharedMemory(segment.name)
