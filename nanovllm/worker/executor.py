"""Executor: runs scheduled batches on the device, through the ModelRunner of each rank."""

from pathlib import Path

from nanovllm.config import Config
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.model_config import ModelConfig
from nanovllm.worker.model_runner import ModelRunner


class Executor:
    """Owns the ModelRunner. Raises ValueError for a model, device or memory that will not do; then nothing is left.

    num_kv_cache_blocks: KV blocks that were allocated.
    """

    def __init__(self, config: Config, model_config: ModelConfig, model_dir: Path) -> None:
        if config.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size must be 1, got {config.tensor_parallel_size}: several GPUs are not supported "
                "yet; use one"
            )
        self._runner: ModelRunner | None = ModelRunner(config, model_config, model_dir)
        self.num_kv_cache_blocks = self._runner.num_kv_cache_blocks

    def run(self, batch: ScheduledBatch) -> list[int]:
        """Compute `batch`; the new token ids of batch.sampled_sequences, in their order."""
        assert self._runner is not None
        return self._runner.run(batch)

    def close(self) -> None:
        """Give memory back. May be called twice."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
