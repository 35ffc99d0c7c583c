"""PlainLLM: an engine without cache, batch and schedule, over reference/. Its subclasses break one contract each."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from reference.checkpoint import Checkpoint, load_checkpoint
from reference.sampling import sampling
from reference.transformer import transformer

VOCABULARY = "model.embed_tokens.weight"


@dataclass(frozen=True)
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: str | None = None
    stop_token_ids: Sequence[int] = ()


class Sampler(torch.nn.Module):
    """A module, since errors are planted where modules are called."""

    def forward(self, *args: Any, **options: Any) -> int:
        return sampling(*args, **options)


class PlainLLM:
    """`prompts` and `params` are those of the running call; a fault may look at the company of a request there."""

    accepted = ""  # a kind of bad request that a fault does not refuse
    changes: ClassVar[dict[str, Any]] = {}  # parameters that a fault reads as other values, of every request

    def __init_subclass__(cls, **attributes: Any) -> None:
        """breaks: the contract that the subclass breaks; and other attributes."""
        for name, value in attributes.items():
            setattr(cls, name, value)

    def __init__(self, model: str, max_model_len: int, max_num_batched_tokens: int, num_blocks: int, block_size: int):
        self.model, self.checkpoint = model, _checkpoint(model)
        self.max_model_len, self.max_num_batched_tokens = max_model_len, max_num_batched_tokens
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_free_blocks = num_blocks
        self.kv_cache: Any = torch.zeros(num_blocks, block_size)  # so that there is memory to give back
        self.sampler = Sampler()
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    def generate(self, prompts: list[Any], sampling_params: list[SamplingParams], use_tqdm: bool = True) -> list[Any]:
        prompts = [self.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompts]
        self.check_call(prompts, sampling_params)
        for prompt, params in zip(prompts, sampling_params, strict=False):
            self.check(prompt, params)
        return self.run(prompts, sampling_params)

    # --- what is refused ---

    def check_call(self, prompts: list[list[int]], params: list[SamplingParams]) -> None:
        if len(prompts) != len(params):
            raise ValueError(f"{len(prompts)} prompts, {len(params)} sampling_params")

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        for kind, is_wrong in self.wrongs(prompt, params).items():
            if is_wrong and kind != self.accepted:
                raise ValueError(f"bad request: {kind}")

    def wrongs(self, prompt: list[int], params: SamplingParams) -> dict[str, bool]:
        return {
            "an empty prompt": not prompt,
            "max_tokens of 0": params.max_tokens < 1,
            "a prompt longer than max_model_len": len(prompt) >= self.max_model_len,
            "a negative token id": min(prompt, default=0) < 0,
            "a token id beyond the vocabulary": max(prompt, default=0) >= len(self.checkpoint.weights[VOCABULARY]),
            "more blocks than exist": self.blocks_of(prompt, params) > self.num_blocks,
        }

    def blocks_of(self, prompt: list[int], params: SamplingParams) -> int:
        return -(-min(len(prompt) + params.max_tokens, self.max_model_len) // self.block_size)

    # --- what is computed ---

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        self.prompts, self.params = prompts, [replace(one, **self.changes) for one in params]
        return [self.complete(index) for index in range(len(prompts))]

    def complete(self, index: int) -> dict[str, Any]:
        """The output of one request of the running call."""
        params, token_ids = self.params[index], []
        max_tokens = min(params.max_tokens, self.max_tokens_that_fit(index))
        ending = {*params.stop_token_ids, *(() if params.ignore_eos else self.ends)}
        while len(token_ids) < max_tokens and not ending.intersection(token_ids[-1:]):
            token_ids.append(self.next_token(index, token_ids))
            if params.stop is not None and params.stop in (text := self.tokenizer.decode(token_ids)):
                return {"text": text.partition(params.stop)[0], "token_ids": token_ids}
        return {"text": self.tokenizer.decode(token_ids), "token_ids": token_ids}

    def max_tokens_that_fit(self, index: int) -> int:
        return self.max_model_len - len(self.prompts[index])

    def next_token(self, index: int, generated: list[int]) -> int:
        params, context = self.params[index], self.context(index, generated)
        logits = _next_logits(self.model, tuple(context))
        position = len(self.prompts[index]) + len(generated)
        return self.sampler(logits, params.temperature, params.top_k, seed=self.seed(index), position=position)

    def context(self, index: int, generated: list[int]) -> list[int]:
        """The tokens that the model reads."""
        return [*self.prompts[index], *generated]

    def seed(self, index: int) -> int:
        return self.params[index].seed or 0

    @property
    def ends(self) -> set[int]:
        return {*self.checkpoint.config.eos_token_ids}

    @property
    def tokenizer(self) -> Any:
        return _tokenizer(self.model)

    def close(self) -> None:
        self.kv_cache = None


@functools.cache
def _checkpoint(model: str) -> Checkpoint:
    return load_checkpoint(model, torch.float32)


@functools.cache
def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@functools.lru_cache(maxsize=20_000)  # every engine of a test asks for the same ones
def _next_logits(model: str, context: tuple[int, ...]) -> torch.Tensor:
    return transformer(context, *_checkpoint(model))[-1].clone()
