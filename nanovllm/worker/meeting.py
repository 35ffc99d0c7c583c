"""How the ranks of one machine connect, though one may die or be suspended at any moment.

NCCL cannot be called off while it waits for a rank that has not come. So all say first that they are there: what is
left is the moment until a rank has connected, in which one that dies is still waited for.

gloo's own connecting cannot be called off: a rank that listens for one which has died listens until its time is up. So
that time is short, and it too begins when all ranks have come. When it did not suffice, a rank was slow: after each
attempt all ranks wait, for as long as it takes, for what the others say of it, and unless all have connected, all try
again.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed

from nanovllm.worker.process_group import FOR_EVER, Place, PrefixStore, nccl
from nanovllm.worker.torch_state import gpu_lock

dist: Any = torch.distributed  # its type stubs lack what its documentation has

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 2.0  # in one attempt, for a connection
ADDRESS_SECONDS = 1.0  # in one attempt, for an address; less than that a FileStore does not count
MAX_ATTEMPTS = 10  # what fails as often has another cause than a slow rank
POLL_SECONDS = 0.005
# torch watches NCCL from a thread of its own, which ends the whole process when a rank has gone, or when it was
# suspended for long. Here rank 0 notices itself, says what happened and goes on, so that thread is to do nothing; least
# of all to wait for a minute first, since closing the group waits for it. Under torchrun it does its work: there a rank
# that ends is what torchrun notices.
UNWATCHED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}

_environment_lock = threading.Lock()


def meet(place: Place, store: Any, check: Callable[[], None] = lambda: None) -> Any:
    """A group of all ranks, once every rank has come: over NCCL where each has a GPU of its own, else over gloo.

    Nothing here notices that a rank has died: `check` is called now and then, and ends the waiting when it raises, at
    the latest when an attempt is over. Raises RuntimeError when MAX_ATTEMPTS have failed.
    """
    if place.has_own_gpu:
        with gpu_lock:
            torch.cuda.synchronize()  # makes this process's context on its GPU, which takes a while
        _hear_all(PrefixStore("come", store), place, "here", check)
        with _environment(UNWATCHED):  # which torch reads when it makes a group; it connects later
            return nccl(place, store)
    for attempt in itertools.count(1):
        here = PrefixStore(f"attempt {attempt}", store)
        _hear_all(PrefixStore("come", here), place, "here", check)
        group, error = _connect_gloo(place, PrefixStore("gloo", here))
        words = _hear_all(PrefixStore("connected", here), place, "no" if group is None else "yes", check)
        if group is not None and set(words) == {"yes"}:
            group._set_default_timeout(FOR_EVER)
            return group
        if attempt == MAX_ATTEMPTS:
            raise error or RuntimeError(f"{words.count('no')} of {place.size} ranks failed to connect over gloo")


def _connect_gloo(place: Place, store: Any) -> tuple[Any, RuntimeError | None]:
    """(group, None), or (None, why not)."""
    options = dist.ProcessGroupGloo._Options()  # the public ways take no address
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    # gloo waits so long for an address, rounded up to ADDRESS_SECONDS, and five times as long for a connection.
    options._timeout = timedelta(seconds=CONNECT_SECONDS / 5)
    try:
        return dist.ProcessGroupGloo(store, place.rank, place.size, options), None
    except RuntimeError as error:
        return None, error.with_traceback(None)


def _hear_all(store: Any, place: Place, word: str, check: Callable[[], None]) -> list[str]:
    """Say `word`; what the ranks say, in their order, once all have."""
    keys = [str(rank) for rank in range(place.size)]
    store.set(str(place.rank), word)
    while not store.check(keys):
        check()
        time.sleep(POLL_SECONDS)
    return [store.get(key).decode() for key in keys]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """With these; afterwards as before, for groups that are not ours. One thread at a time."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
