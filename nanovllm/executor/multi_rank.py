"""MultiRankExecutor: what the executors with several ranks have in common, on rank 0."""

import threading
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import NoReturn

import torch

from nanovllm.distributed.placement import RankPlacement
from nanovllm.distributed.process_group import DaemonThread, abort_process_group, destroy_process_group
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.executor.base import Executor, PendingTokens, RankError, free_frames
from nanovllm.executor.failure_monitor import FailureMonitor, State
from nanovllm.executor.worker_main import StepMessage, WorkerSpec
from nanovllm.worker.async_output import AsyncModelOutput
from nanovllm.worker.model_runner import ModelRunner

ROOT_CAUSE_TIMEOUT_S = 5.0  # to find the failure of another rank that explains an error of rank 0
SHUTDOWN_TIMEOUT_S = 10.0  # for workers to end by themselves, and for an abort
ENDED = "the ranks of this engine have ended: make a new one"


class MultiRankPendingTokens:
    """A step of all ranks; its failure closes the executor.

    The output belongs to the executor, which frees it when it closes: an engine or a traceback that keeps this object
    keeps no device memory.
    """

    def __init__(self, output: AsyncModelOutput, collect: Callable[["MultiRankPendingTokens"], list[int]]) -> None:
        self.batch = output.batch
        self._output = weakref.ref(output)
        self._collect = collect

    @property
    def output(self) -> AsyncModelOutput:
        output = self._output()
        if output is None:
            raise RuntimeError(ENDED)
        return output

    def token_ids(self) -> list[int]:
        return self._collect(self)


class MultiRankExecutor(Executor):
    """Sends each step to the other ranks and computes it on rank 0's ModelRunner.

    When another rank's failure explains an exception of rank 0, that failure is raised.
    """

    def __init__(self, spec: WorkerSpec, placement: RankPlacement, monitor: FailureMonitor) -> None:
        self._placement = placement
        self._monitor = monitor
        self._tp: TensorParallel | None = None
        self._runner: ModelRunner | None = None
        self._abort_lock = threading.Lock()  # guards _aborted: rank 0 and a monitor thread may abort at once
        self._aborted: DaemonThread | None = None
        self._outputs: deque[AsyncModelOutput] = deque(maxlen=2)  # of the step in flight and the one before
        try:
            self._connect(spec)
            assert self._tp is not None
            self._runner = spec.make_runner(placement, self._tp, monitor.check)
        except BaseException as error:
            self._fail(error)
        self.num_kv_cache_blocks = self._runner.num_kv_cache_blocks
        self.kv_cache_block_size = self._runner.block_size
        self.supports_async_scheduling = self._tp.is_nccl

    def execute(self, batch: ScheduledBatch, previous: PendingTokens | None = None) -> MultiRankPendingTokens:
        if self._runner is None:
            raise RuntimeError(ENDED)
        try:
            assert previous is None or isinstance(previous, MultiRankPendingTokens)
            previous_sequences = None if previous is None else previous.batch.sampled_sequences
            self._send(StepMessage(batch, previous_sequences))
            previous_token_ids = None if previous is None else previous.output.sampled
            self._outputs.append(self._runner.run(batch, previous_sequences, previous_token_ids))
        except BaseException as error:
            self._fail(error)
        return MultiRankPendingTokens(self._outputs[-1], self._collect)

    def _collect(self, pending: MultiRankPendingTokens) -> list[int]:
        try:
            token_ids = pending.output.token_ids()
            self._monitor.check()  # when a rank has failed, these are not the tokens
        except BaseException as error:
            self._fail(error)
        return token_ids

    @property
    def is_closed(self) -> bool:
        return self._runner is None

    def _fail(self, error: BaseException) -> NoReturn:
        """Shut down and raise `error`, or the root cause from it."""
        root_cause: BaseException | None = None
        try:
            # Neither ValueError nor KeyboardInterrupt nor rank 0's own lack of memory follows from another rank's end,
            # and a RankError is the root cause itself.
            if isinstance(error, RuntimeError) and not isinstance(error, (torch.OutOfMemoryError, RankError)):
                root_cause = self._wait_for_root_cause(ROOT_CAUSE_TIMEOUT_S)
        finally:  # also when Ctrl-C ends the waiting
            self._terminate()
            free_frames(error)
            self.close()
        try:
            if root_cause is None:
                raise error
            raise root_cause from error
        finally:  # else this frame and the error would keep each other, and the engine's tensors, until a collection
            del error, root_cause

    def close(self) -> None:
        state = self._monitor.stop()
        if state is State.CLOSED:
            return
        try:
            if state is not State.FAILED:
                self._request_shutdown()  # first, since destroying an NCCL group may wait for the other ranks
                self._free_runner()  # its graphs recorded the group's collectives
                if self._tp is not None:
                    destroy_process_group(self._tp)
                    self._tp = None
                self._wait_for_workers()
        except BaseException:
            self._terminate()
            raise
        finally:
            self._outputs.clear()
            self._free_runner()
            self._release()
            self._monitor.close()
            if self._aborted is not None:
                self._aborted.join(SHUTDOWN_TIMEOUT_S)
                if self._tp is not None:
                    self._tp.close_peers()
            self._tp = self._aborted = None

    def _free_runner(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def _abort_group(self) -> None:
        """Start to abort the process group, once."""
        with self._abort_lock:
            if self._tp is not None and self._aborted is None:
                self._aborted = abort_process_group(self._tp)

    def _terminate(self) -> None:
        self._monitor.fail()
        self._kill_workers()
        self._abort_group()

    # --- what an implementation provides ---

    @abstractmethod
    def _connect(self, spec: WorkerSpec) -> None:
        """Wait until all ranks have connected, and store rank 0's end of the group as self._tp."""

    @abstractmethod
    def _send(self, message: StepMessage) -> None: ...

    def _wait_for_root_cause(self, timeout: float) -> RankError | None:
        """The failure of another rank; None if there is none after `timeout` seconds."""
        return self._monitor.wait_for_root_cause(timeout)

    def _kill_workers(self) -> None:
        """Kill the workers that this process started."""

    @abstractmethod
    def _request_shutdown(self) -> None:
        """Ask the workers to end when they have computed what was sent."""

    def _wait_for_workers(self) -> None:
        """Wait until the workers have ended, for a limited time."""

    @abstractmethod
    def _release(self) -> None:
        """Free all remaining resources, workers included."""
