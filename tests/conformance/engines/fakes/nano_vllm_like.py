"""LLM and SamplingParams with nano-vllm's signatures and behaviour towards its user, over PlainLLM."""

import dataclasses
from types import SimpleNamespace
from typing import Any

from tests.conformance.engines.fakes import plain


@dataclasses.dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        assert self.temperature > 1e-10, "greedy sampling is not permitted"


class LLM:
    """Unknown options are ignored, and the number of blocks is found out."""

    def __init__(self, model: str, **options: Any) -> None:
        limits = {name: options.get(name, 4096) for name in ("max_model_len", "max_num_batched_tokens")}
        assert limits["max_num_batched_tokens"] >= limits["max_model_len"]
        self.engine: Any = plain.PlainLLM(model, **limits, num_blocks=16, block_size=256)
        self.scheduler = SimpleNamespace(block_manager=SimpleNamespace(free_block_ids=list(range(16))))

    def generate(
        self, prompts: list[Any], sampling_params: SamplingParams | list[SamplingParams], use_tqdm: bool = True
    ) -> list[dict[str, Any]]:
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        return self.engine.generate(prompts, [plain.SamplingParams(**vars(one)) for one in params])

    def exit(self) -> None:
        del self.engine
