"""Messages through shared memory: whole, in order, to every receiver; and a dead one does not hold the sender."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import shared_memory
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nanovllm import SamplingParams
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.worker.shm_channel import CAPACITY, ShmReceiver, ShmSender, encode
from tests.support.counts import count_comparisons, record_error
from tests.support.limits import HANG_SECONDS

SPAWN = multiprocessing.get_context("spawn")


class ReceiverGone(Exception):
    pass


def gone() -> None:
    raise ReceiverGone


def never() -> None:
    """The check of a sender whose receivers are all well."""


def give_up_after(seconds: float) -> Callable[[], None]:
    """The check of a sender that is not to wait for ever."""
    end = time.monotonic() + seconds

    def check() -> None:
        assert time.monotonic() < end, "a receiver never reads what was sent"

    return check


def receive_all(receiver: ShmReceiver, count: int) -> list[Any]:
    return [receiver.receive() for _ in range(count)]


def received_by_each(sender: ShmSender, messages: list[Any]) -> list[list[Any]]:
    """What receivers in threads get when `messages` are sent one after the other."""
    results: list[list[Any]] = [[] for _ in sender.receivers]

    def run(index: int, receiver: ShmReceiver) -> None:
        results[index] = receive_all(receiver, len(messages))

    # Daemons: a message that never comes fails the test, and is not waited for at the end of the run as well.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(sender.receivers)]
    for thread in threads:
        thread.start()
    for message in messages:
        sender.send(message, give_up_after(HANG_SECONDS))
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive(), "a receiver waits for a message that was sent"
    return results


@given(
    capacity=st.integers(1, 64),
    num_receivers=st.integers(1, 3),
    messages=st.lists(st.binary(max_size=200) | st.integers() | st.none(), min_size=1, max_size=5),
)
def test_every_message_reaches_every_receiver_whole_and_in_order(
    capacity: int, num_receivers: int, messages: list[Any]
) -> None:
    """D31: whatever its size; most of these are longer than the segment."""
    sender = ShmSender(num_receivers, SPAWN, capacity)
    try:
        assert received_by_each(sender, messages) == [messages] * num_receivers
    finally:
        sender.close()
    count_comparisons("ranks: messages received against those sent", len(messages) * num_receivers)


def test_a_message_of_three_segments_and_a_byte() -> None:
    """D31: 3 MiB, and sizes around the border of a piece."""
    overhead = len(encode(b"x" * CAPACITY)) - CAPACITY
    messages = [bytes(CAPACITY - overhead + more) for more in (-1, 0, 1)] + [os.urandom(3 * CAPACITY + 1)]
    sender = ShmSender(1, SPAWN)
    try:
        assert received_by_each(sender, messages) == [messages]
    finally:
        sender.close()


def test_a_decode_step_of_256_sequences_is_less_than_64_kib() -> None:
    """D31: sequences of 4096 tokens in blocks of 256 anywhere in a large pool, each with parameters of its own."""
    sequences = []
    for index in range(256):
        params = SamplingParams(
            temperature=0.5 + index / 1000, top_k=50 + index, top_p=0.9 - index / 1000, seed=2**63 + index,
            stop_token_ids=[index, 151643],
        )  # fmt: skip
        seq = Sequence([7] * 4096, params, seq_id=100_000 + index, block_size=256, seed=2**63 + index)
        seq.block_table = [(index * 16 + block) * 13 % 60_000 for block in range(16)]
        seq.num_cached_tokens = seq.num_tokens_with_kv = 4095
        seq.num_scheduled_tokens = 1
        sequences.append(seq)
    batch = ScheduledBatch(False, tuple(sequences), (1,) * 256, tuple(sequences))
    size = len(encode(batch))
    record_error("bytes of a decode step of 256 sequences", size, 64 * 1024)
    assert size < 64 * 1024


def test_a_slow_receiver_is_waited_for_and_looked_after() -> None:
    sender = ShmSender(1, SPAWN, 8)
    receiver = sender.receivers[0]
    checked = threading.Event()
    message = bytes(range(100))
    results: list[Any] = []

    def read_late() -> None:
        assert checked.wait(HANG_SECONDS)  # the sender has come to wait, and has looked
        results.append(receiver.receive())

    thread = threading.Thread(target=read_late, daemon=True)
    thread.start()
    sender.send(message, checked.set)
    thread.join(HANG_SECONDS)
    sender.close()
    assert results == [message]


def test_a_sender_is_let_go_when_its_receiver_is_found_gone() -> None:
    """D33: the second message finds the first unread."""
    sender = ShmSender(2, SPAWN)
    sender.send("read by nobody", gone)
    with pytest.raises(ReceiverGone):
        sender.send("more", gone)
    sender.close()


def test_a_receiver_killed_while_it_waits_does_not_hold_the_sender() -> None:
    """D33: multiprocessing.Event.set() would wait for it for ever."""
    sender = ShmSender(1, SPAWN)
    process = SPAWN.Process(target=receive_all, args=(sender.receivers[0], 2))
    process.start()
    sender.send("read", never)
    receiver = sender.receivers[0]
    assert receiver.is_read.acquire(timeout=HANG_SECONDS)  # it has read, and waits again
    receiver.is_read.release()
    process.kill()
    process.join(HANG_SECONDS)
    assert process.exitcode == -signal.SIGKILL
    sender.send("written for a dead one", gone)  # returns
    with pytest.raises(ReceiverGone):
        sender.send("more", gone)
    sender.close()


def test_stale_segments_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """D32: a name that a crashed program left is passed over, and what lies there is left alone."""
    stale = SharedMemory(create=True, size=16)
    stale.buf[:5] = b"stale"
    make_name = shared_memory._make_filename  # type: ignore[attr-defined]
    names = iter([stale._name])  # type: ignore[attr-defined]
    monkeypatch.setattr(shared_memory, "_make_filename", lambda: next(names, None) or make_name())
    sender = ShmSender(1, SPAWN)
    assert sender._segment.name != stale.name
    assert received_by_each(sender, ["hello"]) == [["hello"]]
    sender.close()
    assert bytes(stale.buf[:5]) == b"stale"
    stale.close()
    stale.unlink()


def test_two_channels_do_not_meet() -> None:
    """D32."""
    first, second = ShmSender(1, SPAWN), ShmSender(1, SPAWN)
    first.send("first", never)
    second.send("second", never)
    assert (second.receivers[0].receive(), first.receivers[0].receive()) == ("second", "first")
    first.close()
    second.close()


def test_close_gives_the_segment_back() -> None:
    """D32."""
    sender = ShmSender(1, SPAWN)
    name = sender._segment.name
    sender.close()
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)


def test_a_message_is_a_copy() -> None:
    """D03: what is sent stays as it was."""
    message = {"tokens": [1, 2, 3]}
    assert pickle.loads(encode(message)) == message
    sender = ShmSender(1, SPAWN)
    sender.send(message, never)
    message["tokens"].append(4)
    assert sender.receivers[0].receive() == {"tokens": [1, 2, 3]}
    sender.close()
