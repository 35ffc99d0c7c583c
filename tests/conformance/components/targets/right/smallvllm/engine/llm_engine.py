"""LLMEngine: what users call."""

from smallvllm.config import Config
from smallvllm.engine.model_runner import ModelRunner
from smallvllm.engine.scheduler import Scheduler
from smallvllm.engine.sequence import Sequence
from smallvllm.sampling_params import SamplingParams
from transformers import AutoTokenizer


class LLMEngine:
    def __init__(self, model: str, **options):
        self.config = Config(model, **options)
        self.model_runner = ModelRunner(self.config)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.scheduler = Scheduler(self.config)

    def add_request(self, prompt: str | list[int], sampling_params: SamplingParams):
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self.scheduler.add(Sequence(tokens, sampling_params, self.config.kvcache_block_size))
