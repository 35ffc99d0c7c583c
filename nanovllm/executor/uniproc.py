"""UniprocExecutor: one rank, which computes in this process."""

from pathlib import Path

from nanovllm.config import Config
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.executor.base import Executor, PendingTokens, free_frames
from nanovllm.model_config import ModelConfig
from nanovllm.worker.async_output import AsyncModelOutput
from nanovllm.worker.model_runner import ModelRunner


class UniprocExecutor(Executor):
    """A step that fails leaves the executor usable."""

    def __init__(self, config: Config, model_config: ModelConfig, model_dir: Path) -> None:
        try:
            runner = ModelRunner(config, model_config, model_dir)
        except BaseException as error:
            free_frames(error)
            raise
        self._runner: ModelRunner | None = runner
        self.num_kv_cache_blocks = runner.num_kv_cache_blocks
        self.kv_cache_block_size = runner.block_size
        self.supports_async_scheduling = runner.device.type == "cuda"

    def execute(self, batch: ScheduledBatch, previous: PendingTokens | None = None) -> AsyncModelOutput:
        if self._runner is None:
            raise RuntimeError("this engine is closed: make a new one")
        if previous is None:
            return self._runner.run(batch)
        assert isinstance(previous, AsyncModelOutput)
        return self._runner.run(batch, previous.batch.sampled_sequences, previous.sampled)

    @property
    def is_closed(self) -> bool:
        return self._runner is None

    def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
