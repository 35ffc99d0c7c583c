"""Rendezvous of the ranks on one machine; tolerates a rank that dies or stalls while connecting.

Neither NCCL nor gloo can be interrupted while it waits for a rank that does not connect.
NCCL: each rank publishes its status first, so that only the connecting itself remains uninterruptible.
gloo: an attempt to connect has a short timeout, which begins when all ranks have published their status. After each
attempt the ranks exchange whether they have connected, and all try again unless all have. So a slow rank costs
attempts, but does not fail the engine.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.process_group import NO_TIMEOUT, PrefixStore, dist, new_nccl_group

LOOPBACK = "127.0.0.1"
CONNECT_TIMEOUT_S = 2.0  # of one attempt, for a connection
ADDRESS_TIMEOUT_S = 1.0  # of one attempt, for a rank's address; a FileStore's timeouts have a resolution of 1 s
MAX_ATTEMPTS = 10  # after this many failed attempts, the cause is not a slow rank
POLL_S = 0.005
# torch's NCCL watchdog thread ends the process when a rank has died or was suspended for long, and destroying a group
# waits for that thread, which waits up to a minute for a debug dump. The FailureMonitor replaces it. Under torchrun the
# watchdog stays on: torchrun detects the process that it ends.
NCCL_WATCHDOG_OFF_ENV = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}

_environment_lock = threading.Lock()


def rendezvous(placement: RankPlacement, store: Any, check: Callable[[], None] = lambda: None) -> Any:
    """A group of all ranks, once every rank has joined: over NCCL if each has a GPU of its own, else over gloo.

    Initialize CUDA before the call, which takes seconds: NCCL does not detect that a rank dies after its status is
    published.
    check: called repeatedly while other ranks are waited for; an exception from it ends the waiting, at the latest when
        the current attempt has ended. Raises RuntimeError after MAX_ATTEMPTS failed attempts.
    """
    if placement.has_own_gpu:
        _exchange_status(PrefixStore("come", store), placement, "here", check)
        with _environment(NCCL_WATCHDOG_OFF_ENV):  # torch reads it when it makes a group
            return new_nccl_group(placement, store)
    for attempt in itertools.count(1):
        attempt_store = PrefixStore(f"attempt {attempt}", store)
        _exchange_status(PrefixStore("come", attempt_store), placement, "here", check)
        group, error = _connect_gloo(placement, PrefixStore("gloo", attempt_store))
        status = "connected" if group is not None else "failed"
        statuses = _exchange_status(PrefixStore("connected", attempt_store), placement, status, check)
        if group is not None and "failed" not in statuses:
            group._set_default_timeout(NO_TIMEOUT)
            return group
        if attempt == MAX_ATTEMPTS:
            num_failed = statuses.count("failed")
            raise error or RuntimeError(f"{num_failed} of {placement.size} ranks failed to connect over gloo")


def _connect_gloo(placement: RankPlacement, store: Any) -> tuple[Any, RuntimeError | None]:
    """(group, None), or (None, error)."""
    options = dist.ProcessGroupGloo._Options()  # the public constructor takes no address
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    # gloo waits this long for an address, rounded up to ADDRESS_TIMEOUT_S, and five times as long for a connection.
    options._timeout = timedelta(seconds=CONNECT_TIMEOUT_S / 5)
    try:
        return dist.ProcessGroupGloo(store, placement.rank, placement.size, options), None
    except RuntimeError as error:
        return None, error.with_traceback(None)


def _exchange_status(store: Any, placement: RankPlacement, status: str, check: Callable[[], None]) -> list[str]:
    """Publish `status` and wait until every rank has published. Returns the statuses in rank order."""
    keys = [str(rank) for rank in range(placement.size)]
    store.set(str(placement.rank), status)
    while not store.check(keys):
        check()
        time.sleep(POLL_S)
    return [store.get(key).decode() for key in keys]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables and restore them afterwards, for the program's other groups. One thread at a time."""
    with _environment_lock:
        before = {name: os.environ[name] for name in variables if name in os.environ}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name in variables:
                del os.environ[name]
            os.environ.update(before)
