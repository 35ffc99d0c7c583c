"""TorchrunExecutor: all ranks were started by torchrun, on one or several machines.

torchrun watches the processes and ends them all when one fails, so this executor neither watches nor kills them. When
rank 0 aborts its group, the closed connections end the other ranks. A rank that fails writes its failure to the store
through which the ranks connected, so that rank 0 can raise it.
"""

import pickle
import time
from contextlib import suppress
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from nanovllm.distributed.message_queue import encode
from nanovllm.distributed.placement import RankPlacement, torchrun_placement
from nanovllm.distributed.process_group import PrefixStore, init_process_group, new_gloo_group, new_nccl_group
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor.base import RankError
from nanovllm.executor.failure_monitor import FailureMonitor, RankFailure
from nanovllm.executor.multi_rank import MultiRankExecutor
from nanovllm.executor.worker_main import StepMessage, WorkerSpec, worker_busy_loop
from nanovllm.torchrun_env import TorchrunEnv

FAILURE_KEY = "nanovllm/failure"
POLL_S = 0.05
_has_connected = False


class TorchrunChannel:
    """Messages from rank 0 to the other ranks, over a gloo group, and reports of failures, through torchrun's store."""

    def __init__(self, placement: RankPlacement) -> None:
        global _has_connected
        if _has_connected:
            raise RuntimeError(
                "a program under torchrun starts one engine with several ranks: when it ends, the other processes do"
            )
        _has_connected = True
        self.placement = placement
        self._control: Any = None  # a TensorParallel over gloo: messages are bytes in the host's memory
        self._store, _, _ = next(rendezvous("env://"))

    def connect(self) -> TensorParallel:
        """This rank's end of the group for tensors. Returns when all ranks have connected."""
        group = new_gloo_group(self.placement, PrefixStore("nanovllm/messages", self._store))
        self._control = TensorParallel(self.placement.rank, self.placement.size, group)
        has_nccl = self._control.all_reduce_min(self.placement.has_own_gpu) == 1  # the machines may differ
        new_group = new_nccl_group if has_nccl else new_gloo_group
        return init_process_group(self.placement, PrefixStore("nanovllm/tensors", self._store), new_group)

    def send(self, message: StepMessage | None) -> None:
        """On rank 0: broadcast `message`."""
        data = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)
        self._control.broadcast(torch.tensor([len(data)], device="cpu"))
        self._control.broadcast(data)

    def receive(self) -> StepMessage | None:
        """On the other ranks: the next message. Blocks until there is one."""
        num_bytes = int(self._control.broadcast(torch.empty(1, dtype=torch.int64, device="cpu")))
        data = self._control.broadcast(torch.empty(num_bytes, dtype=torch.uint8, device="cpu"))
        return pickle.loads(data.numpy().tobytes())

    def report_failure(self, error: BaseException) -> None:
        """Let rank 0 raise `error`, unless another rank has reported one before."""
        text = RankFailure.of(error).describe(self.placement.rank, self.placement.size)
        with suppress(Exception):  # the store ends with rank 0
            self._store.compare_set(FAILURE_KEY, "", text)

    def reported_failure(self, timeout: float) -> RankError | None:
        """The first reported failure; None if there is none after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with suppress(Exception):  # the store may have ended
            while time.monotonic() < deadline:
                if self._store.check([FAILURE_KEY]):
                    return RankError(self._store.get(FAILURE_KEY).decode())
                time.sleep(POLL_S)
        return None

    def close(self) -> None:
        self._control = None


class TorchrunExecutor(MultiRankExecutor):
    """Rank 0 of a program that torchrun started. Raises RuntimeError for a second one in the same program."""

    def __init__(self, spec: WorkerSpec, env: TorchrunEnv) -> None:
        placement = torchrun_placement(spec.config.device, env)
        self._channel = TorchrunChannel(placement)
        super().__init__(spec, placement, FailureMonitor({}))

    def _connect(self, spec: WorkerSpec) -> None:
        self._tp = self._channel.connect()

    def _send(self, message: StepMessage) -> None:
        self._channel.send(message)

    def _wait_for_root_cause(self, timeout: float) -> RankError | None:
        return self._channel.reported_failure(timeout)

    def _request_shutdown(self) -> None:
        with suppress(RuntimeError):  # a rank has ended already
            self._channel.send(None)

    def _release(self) -> None:
        self._channel.close()


def run_torchrun_worker(spec: WorkerSpec, env: TorchrunEnv) -> None:
    """Everything that a rank other than 0 does, until rank 0 ends. torchrun sees an exception and ends all ranks."""
    channel = TorchrunChannel(torchrun_placement(spec.config.device, env))
    try:
        worker_busy_loop(spec, channel.placement, channel.connect(), channel.receive)
    except BaseException as error:
        channel.report_failure(error)
        raise
