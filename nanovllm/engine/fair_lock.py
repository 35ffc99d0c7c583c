"""FairLock: a re-entrant lock that threads acquire in the order in which they asked for it."""

import threading
from collections import deque
from contextlib import suppress
from queue import SimpleQueue


class _Ticket(SimpleQueue[None]):
    """A thread's place in the queue of a lock. It gets an item when it is at the head."""

    depth = 0  # how often the thread has acquired the lock and not released it


class FairLock:
    """Use it in a `with` statement. The thread whose ticket is at the head of the queue holds the lock.

    threading.RLock would let a thread that releases and acquires in a loop starve all others.
    Shared state is changed by atomic operations of deque and SimpleQueue only. So a signal handler, or a finalizer run
    by the garbage collector, may acquire the lock at any moment in a thread that waits for it or holds it. An exception
    while waiting, such as KeyboardInterrupt, removes the thread from the queue.
    """

    def __init__(self) -> None:
        self._queue: deque[_Ticket] = deque()
        self._own = threading.local()

    def __enter__(self) -> None:
        ticket = getattr(self._own, "ticket", None) or _Ticket()
        try:
            ticket.depth += 1
            if ticket.depth == 1:
                self._own.ticket = ticket
                self._queue.append(ticket)
            while self._queue[0] is not ticket:
                ticket.get()
        except BaseException:
            self.release()
            raise

    def __exit__(self, *_: object) -> None:
        self.release()

    def try_acquire(self) -> bool:
        """Acquire the lock and return True. Return False at once if any thread, including this one, holds it."""
        if self._queue:
            return False
        ticket = self._own.ticket = _Ticket()
        ticket.depth = 1
        self._queue.append(ticket)
        if self._queue[0] is ticket:
            return True
        self.release()  # another thread was faster
        return False

    def release(self) -> None:
        ticket = self._own.ticket
        ticket.depth -= 1
        if not ticket.depth:
            del self._own.ticket
            self._queue.remove(ticket)
        with suppress(IndexError):  # the queue is empty
            self._queue[0].put(None)  # a thread that gets a second item checks the queue again
