"""LaunchedStep: a step that a device has been given, and whose tokens the host does not wait for yet."""

import torch

from nanovllm.engine.scheduler import ScheduledBatch


class LaunchedStep:
    """batch: what is computed. sampled: the new token ids of batch.sampled_sequences, int64, on the device.

    Their way to the host begins at once, before whatever is launched afterwards.
    """

    def __init__(self, batch: ScheduledBatch, sampled: torch.Tensor) -> None:
        self.batch = batch
        self.sampled = sampled
        self._is_there: torch.cuda.Event | None = None
        self._on_host = sampled
        if sampled.is_cuda:
            self._on_host = torch.empty(sampled.shape, dtype=sampled.dtype, pin_memory=True)
            self._on_host.copy_(sampled, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def token_ids(self) -> list[int]:
        """The new token ids; waits for them."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._on_host.tolist()
