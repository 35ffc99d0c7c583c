"""LLM and SamplingParams with the part of vLLM's signatures that the contracts use, over PlainLLM."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tests.conformance.engines.fakes import plain


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None


class LLM:
    """A prompt is a text or a dict; an output has a list of completions, whose tokens are a tuple here."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        block_size: int,
        enable_prefix_caching: bool,
        gpu_memory_utilization: float,
        num_gpu_blocks_override: int = 128,
    ) -> None:
        if num_gpu_blocks_override * block_size < max_model_len:
            raise ValueError("the KV cache does not hold max_model_len tokens")
        self._engine = plain.PlainLLM(
            model, max_model_len, max_num_batched_tokens, num_blocks=num_gpu_blocks_override, block_size=block_size
        )

    def generate(self, prompts: list[Any], sampling_params: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        texts = [one["prompt_token_ids"] if isinstance(one, dict) else one for one in prompts]
        outputs = self._engine.generate(texts, [_plain(one) for one in sampling_params])
        completions = [SimpleNamespace(text=one["text"], token_ids=tuple(one["token_ids"])) for one in outputs]
        return [SimpleNamespace(outputs=[completion]) for completion in completions]


def _plain(params: SamplingParams) -> plain.SamplingParams:
    return plain.SamplingParams(
        temperature=params.temperature or 1.0,
        top_k=1 if params.temperature == 0 else None,
        max_tokens=params.max_tokens or 0,
        ignore_eos=params.ignore_eos,
        seed=params.seed,
        stop=params.stop if isinstance(params.stop, str) else None,
        stop_token_ids=params.stop_token_ids or (),
    )
