"""The other ranks when torchrun started them all: messages go over a process group, to whatever machine.

torchrun watches the processes, and ends them all when one fails. So nothing is watched or killed here; but a rank that
fails leaves word in the store through which they all met, so that rank 0 can say why.
"""

import pickle
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.worker.local_ranks import END_SECONDS, PATIENCE_SECONDS, RankError
from nanovllm.worker.process_group import Place, PrefixStore, abort, gloo, join, nccl
from nanovllm.worker.rank_process import Model, RankReport, serve
from nanovllm.worker.shm_channel import encode

_FAILURE = "nanovllm/failure"
_has_joined = False


class LaunchedRanks:
    """This process's view of the others, for rank 0 (as LocalRanks) and for the other ranks (receive)."""

    def __init__(self, place: Place) -> None:
        global _has_joined
        if _has_joined:
            raise RuntimeError(
                "a program under torchrun starts one engine with several ranks: when it ends, the other processes do"
            )
        _has_joined = True
        self.place = place
        self.is_broken = False
        self._control: Any = None  # gloo: messages are bytes in the host's memory
        self._tp: TensorParallel | None = None
        self._aborted: Future[Any] | None = None
        self._store, _, _ = next(rendezvous("env://"))

    def connect(self) -> TensorParallel:
        """This rank's end of the group, once all have come."""
        self._control = gloo(self.place, PrefixStore("nanovllm/messages", self._store))
        everyone = TensorParallel(self.place.rank, self.place.size, self._control)
        has_nccl = everyone.minimum(self.place.has_own_gpu) == 1  # the machines may differ
        tp = join(self.place, PrefixStore("nanovllm/tensors", self._store), nccl if has_nccl else gloo)
        self._tp = tp
        return tp

    def send(self, message: object) -> None:
        """Rank 0: let the other ranks have `message`."""
        data = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(data)], device="cpu"))
        self._broadcast(data)

    def receive(self) -> Any:
        """The other ranks: the next message. Waits for it."""
        num_bytes = self._broadcast(torch.empty(1, dtype=torch.int64, device="cpu"))
        return pickle.loads(
            self._broadcast(torch.empty(int(num_bytes), dtype=torch.uint8, device="cpu")).numpy().tobytes()
        )

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self._control.broadcast([tensor], dist.BroadcastOptions()).wait()
        return tensor

    def check(self) -> None:
        """torchrun ends this process when another has failed."""

    def leave_word(self, rank: int, error: BaseException) -> None:
        """What rank 0 is to say about this rank's end; the first word stays."""
        report = RankReport.of(error)
        text = f"rank {rank} of {self.place.size} failed: {report.cause}\n\nIts traceback:\n{report.traceback}"
        with suppress(Exception):  # the store may have gone with rank 0
            self._store.compare_set(_FAILURE, "", text)

    def explain(self, error: BaseException) -> BaseException:
        """The failure of another rank, if rank 0's `error` can be its consequence and there was one; else `error`."""
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            deadline = time.monotonic() + PATIENCE_SECONDS
            with suppress(Exception):
                while time.monotonic() < deadline:
                    if self._store.check([_FAILURE]):
                        return RankError(self._store.get(_FAILURE).decode())
                    time.sleep(0.05)
        return error

    def break_off(self) -> None:
        """The group is lost: closing its connections ends the others."""
        self.is_broken = True
        if self._tp is not None:
            self._aborted = abort(self._tp)

    def say_end(self) -> None:
        """Let the other ranks end."""
        if not self.is_broken:
            with suppress(RuntimeError):  # one that has gone already
                self.send(None)

    def close(self) -> None:
        if self._aborted is not None:
            wait([self._aborted], END_SECONDS)
        self._control = self._tp = self._aborted = None


def serve_launched(model: Model, place: Place) -> None:
    """All that a rank other than 0 does, until rank 0 ends."""
    ranks = LaunchedRanks(place)
    try:
        serve(model, place, ranks.connect(), ranks.receive)
    except BaseException as error:
        ranks.leave_word(place.rank, error)
        raise
