"""FairLock: a re-entrant lock that threads get in the order in which they asked for it."""

import threading
from collections import deque
from contextlib import suppress
from queue import SimpleQueue


class _Ticket:
    """One thread's place in the queue.

    depth: how often the thread has entered and not left yet. turn: gets an item when the ticket is at the head.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.turn: SimpleQueue[None] = SimpleQueue()


class FairLock:
    """Use it in a `with` statement. The thread at the head of the queue holds the lock.

    threading.RLock would let a thread that releases and acquires in a loop starve all others. Here only atomic
    operations (of deque and SimpleQueue) change what threads share. So a signal handler, or a finalizer that the
    garbage collector runs, may enter the lock at any moment in a thread that waits for it or holds it. An exception in
    the waiting (KeyboardInterrupt) gives the place in the queue up.
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
                ticket.turn.get()
        except BaseException:
            self.__exit__()
            raise

    def try_acquire(self) -> bool:
        """Enter and return True, or return False when a thread holds the lock, this one included. Never waits."""
        if self._queue:
            return False
        ticket = self._own.ticket = _Ticket()
        ticket.depth = 1
        self._queue.append(ticket)
        if self._queue[0] is ticket:
            return True
        self.__exit__()  # another thread was faster
        return False

    def __exit__(self, *_: object) -> None:
        ticket = self._own.ticket
        ticket.depth -= 1
        if not ticket.depth:
            del self._own.ticket
            self._queue.remove(ticket)
        with suppress(IndexError):  # the queue is empty
            self._queue[0].turn.put(None)  # a thread that is told twice only looks once more
