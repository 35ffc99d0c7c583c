"""AsyncModelOutput: the sampled tokens of a step that the device may still be computing."""

import torch

from nanovllm.engine.scheduler import ScheduledBatch


class AsyncModelOutput:
    """batch: the step. sampled: the new token ids of batch.sampled_sequences, in their order, int64, on the device.

    The copy to the host is enqueued at construction, before the kernels of any later step.
    """

    def __init__(self, batch: ScheduledBatch, sampled: torch.Tensor) -> None:
        self.batch = batch
        self.sampled = sampled
        self._copy_done: torch.cuda.Event | None = None
        self._on_host = sampled
        if sampled.is_cuda:
            self._on_host = torch.empty(sampled.shape, dtype=sampled.dtype, pin_memory=True)
            self._on_host.copy_(sampled, non_blocking=True)
            self._copy_done = torch.cuda.Event()
            self._copy_done.record()

    def token_ids(self) -> list[int]:
        """The new token ids. Blocks until they are on the host."""
        if self._copy_done is not None:
            self._copy_done.synchronize()
        return self._on_host.tolist()
