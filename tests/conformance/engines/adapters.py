"""Adapters: how each style of engine is spelled, as tables of Python source; the contracts use nothing else of it.

An engine of another style needs a row of its own here. What an engine cannot do stands in `lacks` with the reason; a
contract that needs it is reported as not applicable, and never as kept.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ALL_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
LIMITS = {"max_num_seqs": 8, "max_model_len": 1024, "max_num_batched_tokens": 1024}


@dataclass(frozen=True)
class Adapter:
    """One style of engine. `{}` in a piece of source stands for what the comment names.

    recognised_by: fields of SamplingParams; an engine whose class has them all is taken to be of this style.
    options: keyword arguments of every engine that a contract constructs.
    num_blocks: name of the option that sets the number of KV blocks. block_size: tokens in a block.
    small_budget: a max_num_batched_tokens that divides the prefill of three prompts of 40 tokens.
    dtype: of checkpoint and engine; it decides how much rounding explains.
    events: event -> expression that counts it, where the engine shows that.
    lacks: what this style cannot do -> the reason. A field of SamplingParams counts as lacking only while the class has
        no such field, so that a fork that adds it is tested.
    """

    name: str
    recognised_by: frozenset[str]
    options: Mapping[str, Any]
    greedy: Mapping[str, Any]
    prompt: str = "{}"  # a list of token ids
    token_ids: str = "{}['token_ids']"  # an output
    text: str = "{}['text']"  # an output
    generate: str = "{}.generate({}, {}, use_tqdm=False)"  # the engine, a list of prompts, a list of parameters
    architectures: tuple[str, ...] = ALL_ARCHITECTURES
    dtype: str = "float32"
    block_size: int = 16
    small_budget: int = 16
    num_blocks: str | None = None
    close: str | None = None  # the engine
    free_blocks: str | None = None  # the engine
    events: Mapping[str, str] = field(default_factory=dict)  # the engine
    lacks: Mapping[str, str] = field(default_factory=dict)

    def fitted(self, sampling_fields: Collection[str]) -> "Adapter":
        """This adapter for a class SamplingParams with these fields."""
        return replace(self, lacks={word: why for word, why in self.lacks.items() if word not in sampling_fields})


@dataclass(frozen=True)
class Target:
    """The engine under test. path: folder that holds its package, if Python does not find it otherwise.

    engine_class, sampling_params_class: module and name of each. options override those of the adapter.
    """

    engine_class: tuple[str, str]
    sampling_params_class: tuple[str, str]
    adapter: Adapter
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None

    @property
    def name(self) -> str:
        return ":".join(self.engine_class)


NANOVLLM = Adapter(
    name="nanovllm",
    recognised_by=frozenset({"temperature", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"}),
    options={
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch",
        **LIMITS,
        "kv_cache_block_size": 16,
        "num_kv_cache_blocks": 128,
    },
    greedy={"top_k": 1},
    num_blocks="num_kv_cache_blocks",
    close="{}.close()",
    free_blocks="{}.scheduler.block_manager.num_free_blocks",
    events={
        "preemption": "{}.scheduler.num_preemptions",
        "prefill chunk": "{}.scheduler.num_prefill_chunks",
        "prefix hit": "{}.scheduler.block_manager.num_hit_blocks",
    },
)

NANO_VLLM = Adapter(
    name="nano-vllm",
    recognised_by=frozenset({"temperature", "max_tokens", "ignore_eos"}),
    options={**LIMITS, "gpu_memory_utilization": 0.5},
    greedy={"temperature": 1e-6},  # it refuses 0; divided by this, all logits but the largest are out of reach
    architectures=("qwen3",),
    dtype="bfloat16",  # the checkpoint's own dtype, and FlashAttention has no float32
    block_size=256,
    small_budget=64,  # it must not be below max_model_len
    close="{}.exit()",
    free_blocks="len({}.scheduler.block_manager.free_block_ids)",
    lacks={
        "seed": "its SamplingParams has no seed",
        "stop": "its SamplingParams has no stop strings",
        "stop_token_ids": "its SamplingParams has no stop token ids",
        "num_blocks": "it computes the number of KV blocks from free memory, whatever num_kvcache_blocks says",
        "small_pool": "it computes the number of KV blocks from free memory, whatever num_kvcache_blocks says",
    },
)

VLLM = Adapter(
    name="vllm",
    recognised_by=frozenset({"n", "temperature", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs"}),
    options={
        "dtype": "float32",
        **LIMITS,
        "block_size": 16,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.5,
    },
    greedy={"temperature": 0.0},
    prompt="{{'prompt_token_ids': {}}}",
    token_ids="list({}.outputs[0].token_ids)",
    text="{}.outputs[0].text",
    num_blocks="num_gpu_blocks_override",
    lacks={
        "close": "its LLM class has no method that closes it",
        "free_blocks": "its KV blocks are managed in another process",
        "small_pool": "its constructor refuses a pool that does not hold max_model_len tokens",
    },
)

ADAPTERS = {adapter.name: adapter for adapter in (VLLM, NANOVLLM, NANO_VLLM)}  # those with more fields first


def recognise(sampling_fields: Collection[str]) -> Adapter | None:
    """The first adapter all of whose fields SamplingParams has; None if there is none."""
    fields = set(sampling_fields)
    return next((adapter for adapter in ADAPTERS.values() if adapter.recognised_by <= fields), None)
